"""Whole models that another program packed: loaded on the packed weights, and taken by every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import bitfold
import tiny_lm
from bitfold.cli import app
from bitfold.nn import QWeight
from packed_files import gptq_model


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder, and the model of its decoded weights."""
    path: Path = tmp_path_factory.mktemp("packed") / "m"
    model = tiny_lm.model()
    decoded = gptq_model(path, model)
    tiny_lm.tokenizer().save_pretrained(path)
    model.load_state_dict({**model.state_dict(), **decoded})
    return path, model


def run(*words: str) -> Any:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done


def test_loads_packed(packed: tuple[Path, Any]) -> None:
    """Every packed layer multiplies by its packed weight; the logits are those of the decoded weights.

    Products of 64 and 96 numbers in float32, in another order: a few units of 2**-24 for each of the layers.
    """
    path, model = packed
    loaded = bitfold.load(path)
    weights = [m for m in loaded.modules() if isinstance(m, QWeight)]
    assert len(weights) == 14
    ids = torch.arange(40)[None]
    with torch.no_grad():
        ours, theirs = loaded(input_ids=ids).logits, model(input_ids=ids).logits
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_converts_to_the_decoded_weights(packed: tuple[Path, Any], tmp_path: Path) -> None:
    """Plain weights, and no file left that would say they are packed."""
    path, model = packed
    run("convert", str(path), "-o", str(tmp_path / "plain"), "--dtype", "float32")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert plain.keys() == model.state_dict().keys()
    assert all(torch.equal(w, model.state_dict()[name]) for name, w in plain.items())
    assert not (tmp_path / "plain" / "quantize_config.json").exists()
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again = run("inspect", str(tmp_path / "plain"), "--json")
    assert json.loads(again.stdout)["kind"] == "safetensors"


def test_is_inspected_by_the_names_of_the_model(packed: tuple[Path, Any]) -> None:
    found = json.loads(run("inspect", str(packed[0]), "--json").stdout)
    assert "gptq" in found["kind"]
    rows = {row["tensor"]: row for row in found["tensors"]}
    assert rows.keys() == packed[1].state_dict().keys()
    up = rows["model.layers.0.mlp.up_proj.weight"]
    assert up["quantized"]
    assert up["format"] == "gptq 4 bits, groups of 32"
    assert up["shape"] == [96, 64]


def test_is_judged_and_writes(packed: tuple[Path, Any], tmp_path: Path) -> None:
    """`eval` against it and of it, `generate`: what runs packed predicts what the plain copy predicts."""
    path, model = packed
    tiny_lm.folder(tmp_path / "plain", model)
    text = tmp_path / "text.txt"
    text.write_text(tiny_lm.TEXT)
    words = ["--text", str(text), "--max-tokens", "256", "--context", "64", "--json"]
    for one, other in ((path, tmp_path / "plain"), (tmp_path / "plain", path)):
        found = json.loads(run("eval", str(one), "--reference", str(other), *words).stdout)
        assert found["kl_mean"] < 1e-6, found
    run("generate", str(path), "Line", "--max-new-tokens", "4")


def test_is_quantized_again(packed: tuple[Path, Any], tmp_path: Path) -> None:
    """Every byte of the packed file has a fate, and 8 bits are near the decoded weights."""
    path, model = packed
    run("quantize", str(path), "--bits", "8", "-o", str(tmp_path / "q"))
    loaded = bitfold.load(tmp_path / "q")
    name = "model.layers.1.mlp.down_proj"
    w = model.state_dict()[f"{name}.weight"]
    found = loaded.get_submodule(name).weight.dequantize()
    assert float((found - w).norm() / w.norm()) < 0.01
    assert not (tmp_path / "q" / "quantize_config.json").exists()


def test_repacked_is_exact(packed: tuple[Path, Any], tmp_path: Path) -> None:
    """`convert --to bitfold` says "exact", and every decoded weight is the same, bit for bit."""
    path, model = packed
    found = json.loads(run("convert", str(path), str(tmp_path / "b"), "--to", "bitfold", "--json").stdout)
    assert found["exact"]
    loaded = bitfold.load(tmp_path / "b")
    weights = {name: m for name, m in loaded.named_modules() if isinstance(m, QWeight)}
    assert len(weights) == 14
    assert all(torch.equal(m.dequantize(), model.state_dict()[name]) for name, m in weights.items())
