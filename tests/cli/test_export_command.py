"""`bitfold quantize --export gguf:TYPE`: one file, complete, in the types that were announced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitfold.checkpoints import open_source
from bitfold.checkpoints.gguf.file import GgufFile
from cli_runs import Bitfold, keys_are_documented

CALIBRATED = ("--nsamples", "2", "--seqlen", "32", "--no-fisher")


def types(path: Path) -> dict[str, str]:
    file = GgufFile(path)
    try:
        return {name: tensor.type for name, tensor in file.tensors.items()}
    finally:
        file.close()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["ldlq", "rtn", None])
def test_one_file_that_is_read_back(bitfold: Bitfold, model: Path, tmp_path: Path, method: str | None) -> None:
    out = tmp_path / "m.gguf"
    given = () if method is None else ("--method", method)
    more = () if method == "rtn" else CALIBRATED
    said = bitfold("quantize", model, "--export", "gguf:Q4_K_M", "-o", out, *given, *more, "--json").json
    keys_are_documented("quantize", said)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    assert said["preflight"]["output_bytes"] == out.stat().st_size
    assert any("Q5_0 instead of Q4_K" in text for text in said["preflight"]["substitutes"])
    found = types(out)
    assert {t for name, t in found.items() if "norm" in name} == {"f32"}
    assert found["blk.0.attn_q.weight"] == "q5_0"
    source, original = open_source(out), open_source(model)
    name = "model.layers.0.mlp.up_proj.weight"
    w, q = original.read(name).float(), source.read(name)
    assert 0 < float((w - q).square().sum() / w.square().sum()) < 0.01
    text = "a text of some words"
    assert source.tokenizer()(text)["input_ids"] == original.tokenizer()(text)["input_ids"]
    source.close()


@pytest.mark.filterwarnings("ignore")
def test_exact_and_plain(bitfold: Bitfold, model: Path, tmp_path: Path) -> None:
    said = bitfold("quantize", model, "--export", "gguf:BF16", "-o", tmp_path / "m.gguf", "--json").json
    assert said["method"].startswith("rtn")
    source, original = open_source(tmp_path / "m.gguf"), open_source(model)
    for name in source.names():
        w = original.read(name)
        assert torch.equal(source.read(name).float(), (w if w.dim() < 2 else w.bfloat16()).float())
    source.close()


def test_the_plan_is_told_before(bitfold: Bitfold, model: Path, tmp_path: Path) -> None:
    words = bitfold("quantize", model, "--export", "gguf:Q2_K", "-o", tmp_path / "m.gguf", "--dry-run").out
    assert "Q4_0 instead of Q2_K" in words
    assert "llama.cpp" in words
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [
        ("--export", "gguf:Q9_K"),
        ("--export", "gguf"),
        ("--export", "awq"),
        ("--export", "gguf:Q4_0", "--bits", "4"),
        ("--export", "gguf:Q4_0", "--format", "nf4"),
        ("--export", "gguf:Q4_0", "--method", "trellis"),
        ("--export", "gguf:Q4_0", "--upload-repo", "me/model"),
    ],
)
def test_options_that_contradict_each_other(bitfold: Bitfold, model: Path, tmp_path: Path, wrong: tuple[str]) -> None:
    result = bitfold("quantize", model, "-o", tmp_path / "m.gguf", *wrong)
    assert result.code == 2, result.err
    assert not list(tmp_path.iterdir())


def test_a_file_is_not_written_over(bitfold: Bitfold, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    out.write_bytes(b"mine")
    assert "exists already" in bitfold("quantize", model, "--export", "gguf:Q8_0", "-o", out).err
    assert "is a folder" in bitfold("quantize", model, "--export", "gguf:Q8_0", "-o", tmp_path).err
    assert out.read_bytes() == b"mine"
