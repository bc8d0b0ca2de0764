"""Which blocks a calibrated walk runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

import bitfold
from bitfold import Calibration
from bitfold.calibration import BlockWalk, fisher
from bitfold.calibration import walk as walks
from bitfold.calibration.resume import Bookmarks
from bitfold.calibration.tail import Tail
from bitfold.calibration.walk import At
from bitfold.recipes.recipe import Recipe, Rule
from bitfold.training.reading import Reading

SHORT: dict[str, Any] = {"nsamples": 6, "seqlen": 48}


def test_the_original_is_not_run_in_vain(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a correction for drift its activations change not one byte, so they are not worked out."""
    settings = Calibration(str(source / "text.txt"), **SHORT, drift=0.0, fisher=False)
    options: dict[str, Any] = {"format": "int4-g32", "method": "gptq", "calibration": settings}
    runs: list[int] = []
    original = BlockWalk._run_original

    def counted(walk: BlockWalk, at: At, *rest: Any) -> Any:
        runs.append(at.index)
        return original(walk, at, *rest)

    monkeypatch.setattr(BlockWalk, "_run_original", counted)
    bitfold.quantize(source, tmp_path / "without", **options)
    assert runs == []
    monkeypatch.setattr("bitfold.calibration.session.compares", lambda *_: True)
    bitfold.quantize(source, tmp_path / "with", **options)
    assert runs == [0, 1]
    assert (tmp_path / "without/model.safetensors").read_bytes() == (tmp_path / "with/model.safetensors").read_bytes()


def test_the_walk_ends_where_nothing_is_left(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks behind the last one that is quantized are not run; what comes before has the same bytes."""
    settings = Calibration(str(source / "text.txt"), **SHORT, fisher=False)
    options: dict[str, Any] = {"format": "int4-g32", "method": "gptq", "calibration": settings}
    runs: list[int] = []
    block = BlockWalk.block

    def counted(walk: BlockWalk, index: int, *rest: Any) -> Any:
        runs.append(index)
        return block(walk, index, *rest)

    monkeypatch.setattr(BlockWalk, "block", counted)
    bitfold.quantize(source, tmp_path / "all", **options)
    bitfold.quantize(source, tmp_path / "first", ignore=["model.layers.1.*"], **options)
    assert runs == [0, 1, 0]
    assert not list(tmp_path.glob(".*partial"))
    whole, part = (load_file(tmp_path / name / "model.safetensors") for name in ("all", "first"))
    names = [name for name in part if name.startswith("model.layers.0.")]
    assert names
    assert all(torch.equal(part[name], whole[name]) for name in names)


def test_the_head_is_given_plain_rows(source: Path) -> None:
    """Some tokens of a window keep no strides of the window: with those, products copy the head's weights first."""
    model = LlamaForCausalLM.from_pretrained(source).eval()
    strides: list[tuple[int, ...]] = []

    def note(_module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        x = inputs[0]
        strides.append((x.stride(0) - x.shape[1] * x.shape[2], x.stride(1) - x.shape[2]))

    model.lm_head.register_forward_pre_hook(note)
    ids = torch.arange(300)[None] % 64
    with torch.enable_grad():
        tail = Tail.of(model.requires_grad_(True), ids[:, :8])
        assert tail is not None
        reading = Reading(model)
        states = reading.states(ids[0])
        strides.clear()
        reading.mean(states, ids[0], lambda x, some: (x[:, 0], torch.zeros_like(x)), 1.0)
        fisher.there_and_back(model, tail, ids, torch.Generator().manual_seed(0))
    assert len(strides) >= 4
    assert set(strides) == {(0, 0)}


@pytest.mark.parametrize("killed", [None, 0, 1])
@pytest.mark.parametrize("drift", [0.0, 0.5])
def test_what_lies_before_the_first_quantized_block_runs_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drift: float, killed: int | None
) -> None:
    """The original and the quantized model are the same there; a run goes on behind any block, to the same bytes."""
    rules, runs = Recipe((Rule("re:(?!model.layers.1.).*"), Rule("*", "int3-g32", "ldlq"))), list[int]()
    settings = Calibration(str(source / "text.txt"), **SHORT, drift=drift)
    turn, run = Bookmarks.turn, walks.run_block

    def quantize(out: Path) -> int:
        runs.clear()
        bitfold.quantize(source, out, recipe=rules, calibration=settings)
        return len(runs)

    def counted(*given: Any) -> torch.Tensor:
        runs.append(1)
        return run(*given)

    def killing(self: Bookmarks, index: int, *given: Any) -> None:
        turn(self, index, *given)
        if index == killed:
            raise KeyboardInterrupt

    monkeypatch.setattr(walks, "run_block", counted)
    with monkeypatch.context() as patch:
        patch.setattr(walks.BlockWalk, "unchanged_before", lambda *_: None)
        slow = quantize(tmp_path / "slow")
    if killed is not None:
        with monkeypatch.context() as patch:
            patch.setattr(Bookmarks, "turn", killing)
            with pytest.raises(KeyboardInterrupt):
                quantize(tmp_path / "fast")
    fast = quantize(tmp_path / "fast")
    assert fast < slow if drift else fast <= slow
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("slow", "fast")]
    assert files[0] == files[1]
