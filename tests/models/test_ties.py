"""Tied weights: what transformers computes from a folder is right, whichever of the tied tensors are stored."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitfold
from bitfold.checkpoints import open_source
from bitfold.models.model_ref import ModelRef
from bitfold.models.opening import open_skeleton
from bitfold.models.skeleton import tied_names
from model_zoo import ZOO, outputs

TIED = ("llama-tied", "gemma3", "gpt2", "bert-masked", "t5", "whisper")
CHANGES = ("other values", "same values", "one of several", "aliases alone", "last alias alone")
tied_cases = pytest.mark.parametrize("name", TIED)


def stored(folder: Path, name: str, change: str) -> dict[str, str]:
    """Write the model of a case with its aliases stored otherwise; its tied names."""
    model: Any = ZOO[name].build()
    model.save_pretrained(folder)
    tied, tensors = tied_names(model), load_file(folder / "model.safetensors")
    values = dict(model.state_dict())
    generator = torch.Generator().manual_seed(5)
    for alias, main in tied.items():
        value = values[main].clone()
        if change == "other values" or (change == "one of several" and alias == list(tied)[-1]):
            value = torch.randn(value.shape, generator=generator) * 0.3
        tensors[alias] = value
    if change == "aliases alone":
        tensors = {key: value for key, value in tensors.items() if key not in tied.values()}
    if change == "last alias alone":
        last = {main: alias for alias, main in tied.items()}.values()
        tensors = {key: value for key, value in tensors.items() if key not in {*tied.values(), *tied} or key in last}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tied


@functools.cache
def class_of(name: str) -> Any:
    return type(ZOO[name].build())


def by_transformers(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Any:
    return class_of(name).from_pretrained(folder, dtype=dtype).eval()


def near(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    """Eight bits a weight are within some per cent; other weights are not."""
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= 0.06 * b.norm()


@pytest.mark.filterwarnings("ignore:.*is stored with other values")
@pytest.mark.parametrize(
    "change", ["other values", "same values", "one of several", "aliases alone", "last alias alone"]
)
@tied_cases
def test_what_transformers_computes(name: str, change: str, tmp_path: Path) -> None:
    stored(tmp_path / "m", name, change)
    case = ZOO[name]
    wanted = outputs(by_transformers(tmp_path / "m", name), case.inputs())
    for format, rules in (("plain", "bf16"), ("int8", "int8")):
        bitfold.quantize(tmp_path / "m", tmp_path / format, format=rules)
        near(outputs(bitfold.load(tmp_path / format, dtype=torch.float32), case.inputs()), wanted)
        near(outputs(by_transformers(tmp_path / format, name), case.inputs()), wanted)


@pytest.mark.filterwarnings("ignore:.*is stored with other values")
def test_all_of_the_tied_quantized(tmp_path: Path) -> None:
    """Embedding and head alike, each with its own codes; and one of the two kept."""
    stored(tmp_path / "m", "llama-tied", "other values")
    inputs = ZOO["llama-tied"].inputs()
    wanted = outputs(by_transformers(tmp_path / "m", "llama-tied"), inputs)
    for i, extra in enumerate((["*"], ["*lm_head*"], ["*embed*"])):
        recipe = bitfold.Recipe(tuple(bitfold.Rule(m, "int8") for m in extra))
        bitfold.quantize(tmp_path / "m", tmp_path / f"q{i}", recipe=recipe)
        near(outputs(bitfold.load(tmp_path / f"q{i}"), inputs), wanted)
        near(outputs(by_transformers(tmp_path / f"q{i}", "llama-tied"), inputs), wanted)


@pytest.mark.filterwarnings("ignore:.*is stored with other values")
@pytest.mark.parametrize("change", ["other values", "same values", "aliases alone"])
@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "gpt2", "bert-masked"])
def test_originals_are_streamed_so(name: str, change: str, tmp_path: Path) -> None:
    stored(tmp_path / "m", name, change)
    kind = "AutoModelForMaskedLM" if "bert" in name else "AutoModelForCausalLM"
    found = ModelRef.of(tmp_path / "m").load(kind, torch.float32)
    wanted = by_transformers(tmp_path / "m", name)
    assert all(torch.equal(a, wanted.state_dict()[key]) for key, a in found.state_dict().items())


def test_it_is_said(tmp_path: Path) -> None:
    stored(tmp_path / "m", "llama-tied", "other values")
    source = open_source(tmp_path / "m")
    with pytest.warns(UserWarning, match="lm_head.weight is stored with other values than model.embed_tokens.weight"):
        model = open_skeleton(source)
    source.close()
    assert model is not None
    assert tied_names(model) == {}
