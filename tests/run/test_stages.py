"""Blocks quantized in parts, with the rest of the model trained between them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import bitfold
import tiny_lm
from bitfold.calibration import inputs
from bitfold.calibration.options import Calibration
from bitfold.checkpoints.bitfold_folder import QuantizedSource
from bitfold.errors import ModelError, ResourceError, UsageError
from bitfold.models.model_ref import ModelRef
from bitfold.recipes.options import MethodOptions
from bitfold.recipes.recipe import Recipe, Rule
from bitfold.run import stages as module
from bitfold.run.learning import quantize_and_distill
from bitfold.run.options import Request, RunOptions
from bitfold.system import memory
from bitfold.training.distill import distill
from bitfold.training.options import Distillation

SECOND = "re:(?!model.layers.0.).*"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tiny_lm.folder(tmp_path / "source", tiny_lm.model())
    (folder / "text.txt").write_text(tiny_lm.TEXT, encoding="utf-8")
    return folder


@pytest.fixture
def half(source: Path, tmp_path: Path) -> Path:
    """The first block in two bits, the others as they were."""
    bitfold.quantize(source, tmp_path / "half", recipe=Recipe((Rule(SECOND), Rule("*", "int2-g32"))))
    return tmp_path / "half"


def request(source: Path, out: Path, **more: Any) -> Request:
    text = Calibration(str(source / "text.txt"), nsamples=2, seqlen=32)
    return Request(str(source), out, MethodOptions(bits=2, method="trellis"), text, **more)


def learning(source: Path, **more: Any) -> Distillation:
    short: dict[str, Any] = {"seqlen": 48, "batch": 2, "likeliest": 64, "windows": 40, "steps": 12}
    return Distillation(str(source / "text.txt"), **{**short, **more})


def test_what_is_in_floating_point_learns_with_the_packed_part(source: Path, half: Path, tmp_path: Path) -> None:
    """It takes back more than scales and norms alone; packed codes and the embedding stay."""
    fast = {"steps": 24, "plain_rate": 0.01, "weight_rate": 0.01}
    scales = distill(half, source, tmp_path / "scales", learning(source, **fast))
    both = distill(half, source, tmp_path / "both", learning(source, weights=True, looks=1, **fast))
    assert both.kl_before == pytest.approx(scales.kl_before)
    assert both.kl_after < 0.95 * scales.kl_after
    before, after = (load_file(folder / "model.safetensors") for folder in (half, tmp_path / "both"))
    changed = {name for name, w in before.items() if not torch.equal(w, after[name])}
    assert "model.layers.1.mlp.up_proj.weight" in changed
    assert not any(name.endswith(".codes") for name in changed)
    assert "model.embed_tokens.weight" not in changed


def test_other_windows_come_first(source: Path, half: Path, tmp_path: Path) -> None:
    found = [distill(half, source, tmp_path / str(n), learning(source, first=n, steps=8, looks=1)) for n in (0, 5)]
    assert found[0].kl_before == found[1].kl_before  # what is held out is the same
    one, two = (load_file(tmp_path / str(n) / "model.safetensors") for n in (0, 5))
    assert any(not torch.equal(w, two[name]) for name, w in one.items())


def test_the_memory_of_the_weights_that_learn_is_counted(source: Path, half: Path, tmp_path: Path) -> None:
    limit = (memory.resident() or 0) + 150_000_000  # the teacher fits; what a step is given beside it does not
    with pytest.raises(ResourceError, match="a step needs"):
        distill(half, source, tmp_path / "out", learning(source, weights=True), max_memory=limit)


def test_stages_end_in_a_folder_like_any_other(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks are packed, none of the folders between is left; after a failure in a stage the next call goes on. The
    tokens are weighed once, for the layers of all stages."""
    out, trained, weighed = tmp_path / "out", [], []
    real, weigh = module.distill, inputs.token_weights

    def counted(model: Any, names: Any, *args: Any, **more: Any) -> Any:
        weighed.append(set(names))
        return weigh(model, names, *args, **more)

    monkeypatch.setattr(inputs, "token_weights", counted)

    def failing(*args: Any, **more: Any) -> Any:
        trained.append(sorted(QuantizedSource(args[0]).entries))
        if len(trained) == 1:
            raise ModelError("it fails")
        return real(*args, **more)

    monkeypatch.setattr(module, "distill", failing)
    with pytest.raises(ModelError, match="it fails"):
        quantize_and_distill(request(source, out), RunOptions(), 0.1, stages=2)
    assert not out.exists()
    report, found = quantize_and_distill(request(source, out), RunOptions(), 0.1, stages=2)
    assert trained[0] == trained[1]
    assert all(name.startswith("model.layers.0.") for name in trained[0])
    assert report is not None
    assert found is not None
    assert len(weighed) == 1
    assert {name.split(".")[2] for name in weighed[0]} == {"0", "1"}
    entries = QuantizedSource(out).entries
    kept = json.loads((out / "config.json").read_text())["quantization_config"]["kept"]
    assert not any("proj" in name for name in kept)
    assert {e.format.name for name, e in entries.items() if "layers" in name} == {"trellis-2"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert bitfold.load(out)(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def test_what_the_teacher_predicts_is_kept(
    source: Path, half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Learned from again, in another order, without the teacher; with nothing kept it comes out the same."""
    kept = tmp_path / "lessons"
    distill(half, source, tmp_path / "one", learning(source, steps=2), lessons=kept)
    count = len(list(kept.iterdir()))
    assert count > 0
    loads = []
    real = ModelRef.load
    monkeypatch.setattr(ModelRef, "load", lambda *args: loads.append(args) or real(*args))
    distill(half, source, tmp_path / "two", learning(source, steps=2, first=3), lessons=kept)
    assert len(loads) == (len(list(kept.iterdir())) > count)
    loads.clear()
    distill(half, source, tmp_path / "three", learning(source, steps=2), lessons=kept)
    assert loads == []
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as one:
        three = load_file(tmp_path / "three" / "model.safetensors")
        assert all(torch.equal(one.get_tensor(name), w) for name, w in three.items())


def test_more_stages_than_blocks_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="99 stages"):
        quantize_and_distill(request(source, tmp_path / "out"), RunOptions(), 1.0, stages=99)
