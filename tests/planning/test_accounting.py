"""Every tensor and byte of a source has a fate; what looks wrong is flagged; a folder can be checked later."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

import bitfold
import tiny_lm
from bitfold.checkpoints import open_source
from bitfold.checkpoints.manifest import FILE, verify
from bitfold.checkpoints.safetensors import SafetensorsSource
from bitfold.errors import AccountingError, CheckpointError, ModelError
from bitfold.formats import get_format
from bitfold.methods.anomalies import error_flags
from bitfold.methods.quantize import quantize_tensor
from bitfold.models import skeleton
from bitfold.planning.accounting import account_for
from bitfold.planning.plan import make_plan
from bitfold.recipes.recipe import Recipe
from bitfold.records.run_report import relative_error

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model."""
    return tiny_lm.folder(tmp_path_factory.mktemp("accounting") / "source", tiny_lm.model())


def changed(source: Path, folder: Path, change: Any) -> Path:
    """A copy whose weights went through `change`."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def odd_model(folder: Path) -> Path:
    """What others skip: stacked experts, a layer of an unknown type, a tied head stored twice, a stray tensor."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=96, hidden_size=64, intermediate_size=72, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, tie_word_embeddings=True,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.mixer.weight"] = torch.randn(64, 64)
    weights["stray"] = torch.arange(7)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_nothing_is_skipped_silently(tmp_path: Path) -> None:
    """Each stored tensor has its fate; bytes add up to those of the file."""
    folder = odd_model(tmp_path / "source")
    source = SafetensorsSource(folder)
    model = skeleton.of_config(source.config, "test")
    plan = make_plan(source, model, Recipe.of("int8"), shorten_groups=False)
    account = account_for(source, plan)
    fates = {fate.tensor: fate for fate in account.fates}
    assert set(fates) == set(load_file(folder / "model.safetensors"))
    expert = fates["model.layers.0.block_sparse_moe.experts.1.w2.weight"]
    assert (expert.fate, expert.into) == ("quantized", ("model.layers.0.mlp.experts.down_proj",))
    assert fates["lm_head.weight"].fate == "tied"
    assert fates["stray"].fate == fates["model.layers.0.mixer.weight"].fate == "unused"
    assert fates["model.norm.weight"].fate == "kept"
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    size = (folder / "model.safetensors").stat().st_size
    assert account.totals()["all"] == {"tensors": len(fates), "bytes": size - 8 - header}
    report = bitfold.quantize(folder, tmp_path / "out", format="int8")
    assert report.account == account.totals()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["stray"], torch.arange(7))
    assert verify(tmp_path / "out").problems == []


def test_ties_that_are_not_true(tmp_path: Path) -> None:
    """An alias that is stored with values of its own is a tensor of its own, in the account as well."""
    folder = odd_model(tmp_path / "source")
    tied = bitfold.quantize(folder, tmp_path / "a", format="int8").account["tied"]
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][5, 5] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"lm_head.weight is stored with other values"):
        account = bitfold.quantize(folder, tmp_path / "b", format="int8").account
    assert tied["tensors"] == 1
    assert "tied" not in account


@pytest.mark.parametrize("lie", ["forgotten", "twice", "invented", "bytes"])
def test_what_does_not_add_up_stops_the_run(source: Path, monkeypatch: pytest.MonkeyPatch, lie: str) -> None:
    """Mistakes of our own code: a tensor that nobody plans for, or twice, or bytes that are not in the file."""
    opened = SafetensorsSource(source)
    model = skeleton.of_config(opened.config, "test")
    plan = make_plan(opened, model, Recipe.of("int8"), shorten_groups=False)
    items = list(plan.items)
    if lie == "forgotten":
        plan = replace(plan, items=tuple(items[:-1]))
    elif lie == "twice":
        plan = replace(plan, items=(*items, items[0]))
    elif lie == "invented":
        target = replace(items[0].target, sources=["none.such"])
        plan = replace(plan, items=(replace(items[0], target=target), *items[1:]))
    else:
        monkeypatch.setattr(SafetensorsSource, "data_bytes", lambda self: 12345)
    words = {"forgotten": "have no fate", "twice": "used twice", "invented": "not in the source", "bytes": "the files"}
    with pytest.raises(AccountingError, match=words[lie]):
        account_for(opened, plan)


def test_tensors_that_no_index_names_are_counted(source: Path, tmp_path: Path) -> None:
    """A shard may hold more than its index says; other files of weights are named."""
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    weights["stray"] = torch.ones(3)
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "a.safetensors")
    save_file({"x": torch.ones(1)}, folder / "consolidated.safetensors")
    named = {name: "a.safetensors" for name in weights if name != "stray"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    report = bitfold.quantize(folder, tmp_path / "out", format="int4-asym-g32")
    assert "stray" in [t.tensor for t in report.tensors]
    assert report.unread == ["consolidated.safetensors"]


def wound(kind: str) -> Any:
    """Something wrong with one weight."""
    name = "model.norm.weight" if kind == "nan" else "model.layers.0.mlp.up_proj.weight"

    def change(weights: Weights) -> None:
        w = weights[name]
        if kind == "nan":
            w[3] = float("nan")
        elif kind == "rows":
            w[5:7] = 0
        elif kind == "columns":
            w[:, 9] = 0
        elif kind == "outlier":
            w[:, ::16] *= 100
        else:
            w[:] = w.sign()

    return change


WOUNDS = {
    "nan": "1 numbers are NaN", "rows": "2 rows of zeros", "columns": "1 columns of zeros",
    "outlier": "a Gaussian has .* dB", "few": "few different values",
}  # fmt: skip


@pytest.mark.parametrize("kind", WOUNDS)
def test_what_looks_wrong_is_flagged(source: Path, tmp_path: Path, kind: str) -> None:
    """In the report; under `strict` it is an error, and without it the finished work is taken as it is."""
    folder = changed(source, tmp_path / "source", wound(kind))
    options: dict[str, Any] = {"format": "int4-row", "fit": "absmax"}
    with pytest.raises(AccountingError, match=WOUNDS[kind]), pytest.warns(UserWarning, match="goes on"):
        bitfold.quantize(folder, tmp_path / "out", **options, strict=True)
    assert not (tmp_path / "out").exists()
    again: list[str] = []
    report = bitfold.quantize(folder, tmp_path / "out", **options, on_tensor=lambda t: again.append(t.tensor))
    assert again == []
    assert [t.tensor.split(".")[-2] for t in report.flagged] == ["norm" if kind == "nan" else "up_proj"]
    bitfold.quantize(source, tmp_path / "sound", **options, strict=True)


@pytest.mark.parametrize("name", ["int8", "int4-asym-g64", "int3-g32", "int2-asym-g64", "nf4", "mxfp4", "fp8-e4m3"])
@pytest.mark.parametrize("tails", [2.0, 5.0])
def test_ordinary_weights_are_not_flagged(name: str, tails: float) -> None:
    """From nearly Gaussian to heavy-tailed (Student's t with 5 degrees of freedom)."""
    torch.manual_seed(1)
    normal = torch.randn(96, 768)
    w = normal if tails == 2.0 else normal / torch.distributions.Chi2(tails).sample((96, 768)).div(tails).sqrt()
    q = quantize_tensor(w, name, fit="mse")
    assert error_flags(relative_error(w, q), get_format(name), "mse", feedback=False) == []
    assert error_flags(16 * relative_error(w, q), get_format(name), "mse", feedback=False)
    assert error_flags(float("nan"), get_format(name), "mse", feedback=False)


def test_events(source: Path, tmp_path: Path) -> None:
    """One line a tensor, first and last ones for the run; also of runs that fail, and of the one that goes on."""
    events = tmp_path / "events.jsonl"
    count = [0]

    def stop(_report: object) -> None:
        count[0] += 1
        if count[0] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="goes on"):
        bitfold.quantize(source, tmp_path / "out", format="int4-asym-g32", events=events, on_tensor=stop)
    report = bitfold.quantize(source, tmp_path / "out", format="int4-asym-g32", events=events)
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    kinds = [line["event"] for line in lines]
    assert kinds == ["begin", *["tensor"] * 6, "error", "begin", "resume", *["tensor"] * (len(kinds) - 11), "end"]
    tensors = [line for line in lines if line["event"] == "tensor"]
    assert sorted(line["tensor"] for line in tensors) == sorted(t.tensor for t in report.tensors)
    assert all(set(t.to_dict()) <= set(line) for t, line in zip(report.tensors, tensors, strict=True))
    assert lines[-1]["bytes_after"] == report.bytes_after


DAMAGE = {
    "flip": "content has changed", "short": "it had", "missing": "is missing", "extra": "was not there",
    "config": "config.json: ", "tensor": "does not speak of it",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify(source: Path, tmp_path: Path, damage: str) -> None:
    """Any byte that changes is found; a card that was edited is not damage."""
    out = tmp_path / "out"
    bitfold.quantize(source, out, format="int4-asym-g32")
    (out / "README.md").write_text("mine")
    found = verify(out)
    assert (found.problems, found.tensors) == ([], len(load_file(out / "model.safetensors")))
    weights = out / "model.safetensors"
    data = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    elif damage == "short":
        weights.write_bytes(data[:-1])
    elif damage == "missing":
        (out / "tokenizer.json").unlink()
    elif damage == "extra":
        save_file({"a": torch.ones(1)}, out / "adapter.safetensors")
    elif damage == "config":
        (out / "config.json").write_text((out / "config.json").read_text().replace("int4", "int3"))
    else:
        save_file({**load_file(weights), "added": torch.ones(1)}, weights, metadata={"format": "pt"})
    assert any(DAMAGE[damage] in problem for problem in verify(out).problems)


def test_verify_needs_a_manifest(source: Path, tmp_path: Path) -> None:
    """Other folders, and damaged manifests, are told apart from damaged folders."""
    with pytest.raises(CheckpointError, match="nothing to check against"):
        verify(source)
    bitfold.quantize(source, tmp_path / "out", format="int4-asym-g32")
    for text in ("{", "[]", '{"version": 1}', '{"version": 2, "files": {}}', '{"version": 1, "files": {"a": 1}}'):
        (tmp_path / "out" / FILE).write_text(text)
        with pytest.raises(CheckpointError):
            verify(tmp_path / "out")


def test_gguf_is_accounted_for(tmp_path: Path) -> None:
    """Bytes are those of the file's blocks, not of what they decode to."""
    pytest.importorskip("gguf")
    from gguf_files import LLAMA, llama_tensors, write_gguf

    tensors = llama_tensors()
    path = write_gguf(tmp_path / "m.gguf", "llama", tensors, LLAMA, {"blk.0.ffn_up.weight": "q8_0"})
    source = open_source(path)
    model = skeleton.of_config(source.config, "test")
    totals = account_for(source, make_plan(source, model, Recipe.of("int8"), shorten_groups=False)).totals()
    assert totals["all"]["tensors"] == len(tensors)
    assert totals["all"]["bytes"] == sum(4 * w.size for w in tensors.values()) - 64 * 32 * 4 + 64 * 34
    source.close()


def test_a_config_cannot_announce_endless_layers(source: Path, tmp_path: Path) -> None:
    """A billion layers of nothing would be built one by one."""
    folder = shutil.copytree(source, tmp_path / "endless")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9, "layer_types": None}))
    with pytest.raises(ModelError, match="1000000000 in num_hidden_layers"):
        bitfold.quantize(folder, tmp_path / "out", format="int8")
    assert not (tmp_path / "out").exists()
