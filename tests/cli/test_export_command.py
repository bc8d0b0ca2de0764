"""`bitfold quantize --export gguf:TYPE`: one file, complete, in the types that were announced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitfold.checkpoints import open_source
from bitfold.checkpoints.gguf.file import GgufFile
from bitfold.checkpoints.gguf.imatrix import Imatrix, Importance, read_imatrix, write_imatrix
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
        ("--export", "gguf:auto"),
        ("--export", "gguf:Q4_0", "--target-size", "1MB"),
        ("--export", "gguf:Q4_0", "--imatrix", "m.gguf"),
        ("--bits", "4", "--imatrix", "m.gguf"),
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


@pytest.mark.filterwarnings("ignore")
def test_types_are_chosen_for_a_size(bitfold: Bitfold, model: Path, tmp_path: Path) -> None:
    matrix = tmp_path / "m.gguf"
    said = bitfold("imatrix", model, "-o", matrix, "--nsamples", "4", "--seqlen", "32", "--json").json
    keys_are_documented("imatrix", said)
    assert said["with_costs"] == said["entries"]
    sizes, losses = [], []
    for size in ("80kB", "100kB"):
        out = tmp_path / f"{size}.gguf"
        given = ("--export", "gguf:auto", "--target-size", size, "--method", "rtn", "--json")
        more = ("--imatrix", matrix) if size == "80kB" else CALIBRATED[:4]
        report = bitfold("quantize", model, "-o", out, *given, *more).json
        assert report["preflight"]["output_bytes"] == out.stat().st_size
        sizes.append(out.stat().st_size)
        losses.append(sum(t["error"] or 0 for t in report["tensors"]))
    assert sizes[0] <= 80_000 < sizes[1] <= 100_000
    assert losses[1] < losses[0]
    split = ("--max-shard-size", "20kB", "--imatrix", matrix)
    report = bitfold("quantize", model, "-o", tmp_path / "s.gguf", *given, *split).json
    parts = sorted(tmp_path.glob("s-*.gguf"))
    assert report["output"] == str(parts[0])
    assert len(parts) > 2
    assert 95_000 < sum(path.stat().st_size for path in parts) <= 100_000
    too_small = bitfold(
        "quantize", model, "-o", tmp_path / "n.gguf", *given[:3], "2kB", *given[4:], "--imatrix", matrix
    )
    assert too_small.code == 2
    assert "smallest" in too_small.err


@pytest.mark.filterwarnings("ignore")
def test_inputs_that_matter_lose_less(bitfold: Bitfold, model: Path, tmp_path: Path) -> None:
    matrix = tmp_path / "m.dat"
    bitfold("imatrix", model, "-o", matrix, "--nsamples", "4", "--seqlen", "32", "--no-gradients")
    weights, original = read_imatrix(matrix).entries["blk.0.ffn_down.weight"].squares, open_source(model)
    w = original.read("model.layers.0.mlp.down_proj.weight").float()
    costs = []
    for name, more in (("plain", ()), ("weighed", ("--imatrix", matrix))):
        bitfold("convert", model, tmp_path / f"{name}.gguf", "--to", "gguf:Q4_0", *more)
        source = open_source(tmp_path / f"{name}.gguf")
        costs.append(float(((source.read("model.layers.0.mlp.down_proj.weight") - w).square() @ weights).sum()))
        source.close()
    assert costs[1] < costs[0]
    exact = bitfold("convert", tmp_path / "plain.gguf", tmp_path / "n.gguf", "--to", "gguf", "--imatrix", matrix)
    assert exact.code == 2
    other = tmp_path / "other.gguf"
    write_imatrix(other, Imatrix({"blk.0.ffn_down.weight": Importance(torch.ones(32))}, 8))
    wrong = bitfold("convert", model, tmp_path / "n.gguf", "--to", "gguf:Q4_0", "--imatrix", other)
    assert wrong.code == 3
    assert "another model" in wrong.err
