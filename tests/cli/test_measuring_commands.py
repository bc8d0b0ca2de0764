"""`bitfold eval`, `layers`, `inspect --activations`, `compare` and `report`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import tiny_lm
from bitfold.records.record import read_record
from bitfold.run import driver
from cli_runs import Bitfold, keys_are_documented


def test_eval(bitfold: Bitfold, model: Path, quantized: Path, text: Path, tmp_path: Path) -> None:
    args = ("eval", quantized, "--reference", model, "--text", text, "--context", 64, "--max-tokens", 256)
    result = bitfold(*args, "--cache-dir", tmp_path, "--json").json
    keys_are_documented("eval", result)
    assert result["kl_mean"] > 0
    assert result["windows"] == 4
    passed = bitfold(*args, "--max-kl", 10, "--cache-dir", tmp_path)
    assert passed.code == 0
    assert re.search(r"^perplexity +\d", passed.out, re.M)
    failed = bitfold(*args, "--max-kl", result["kl_mean"] / 2, "--cache-dir", tmp_path, "--json")
    assert failed.code == 7
    assert json.loads(failed.out)["kl_mean"] == pytest.approx(result["kl_mean"])
    assert "above the limit" in failed.err
    assert not read_record(quantized).get("evaluations")
    bitfold(*args, "--save", "--cache-dir", tmp_path)
    (saved,) = read_record(quantized)["evaluations"]
    assert (saved["reference"], saved["kl_mean"]) == ("model", pytest.approx(result["kl_mean"]))
    assert bitfold(*args, "--min-top1", 1, "--cache-dir", tmp_path).code == 7


def test_eval_writes_the_card(bitfold: Bitfold, model: Path, text: Path, tmp_path: Path) -> None:
    driver.quantize(model, tmp_path / "q", bits=8)
    args = ("--text", text, "--context", 64, "--max-tokens", 128, "--update-card")
    assert bitfold("eval", tmp_path / "q", *args).code == 0
    assert "| perplexity |" in (tmp_path / "q" / "README.md").read_text(encoding="utf-8")


def test_eval_embeddings(bitfold: Bitfold, tmp_path: Path) -> None:
    encoder = tiny_lm.folder(tmp_path / "bert", tiny_lm.encoder())
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("one sentence\n\nand another\n", encoding="utf-8")
    args = ("eval", encoder, "--reference", encoder, "--text", sentences, "--metric", "embedding")
    result = bitfold(*args, "--json").json
    keys_are_documented("eval", result)
    assert result["texts"] == 2
    assert result["cosine_min"] == pytest.approx(1)
    assert "cosine, mean" in bitfold(*args).out
    no_perplexity = bitfold("eval", encoder, "--text", sentences)
    assert no_perplexity.code == 4
    assert "--metric embedding" in no_perplexity.err
    assert bitfold(*args, "--max-kl", 1).code == 2


def test_layers(bitfold: Bitfold, model: Path, text: Path, tmp_path: Path) -> None:
    driver.quantize(model, tmp_path / "q", bits=3, group_size=16)
    args = ("layers", tmp_path / "q", "--reference", model, "--text", text, "--context", 32, "--max-tokens", 64)
    result = bitfold(*args, "--swaps", 2, "--swap-tokens", 32, "--save", "--json").json
    keys_are_documented("layers", result)
    assert len(result["layers"]) == 16  # embedding and head as well
    assert sum(e["swap_kl"] is not None for e in result["layers"]) == 2
    assert read_record(tmp_path / "q")["layers"]["layers"] == result["layers"]
    assert re.search(r"^model\.layers\.0\.mlp\.up_proj\.weight +int3-asym-g16 +4\.\d", bitfold(*args).out, re.M)


def test_inspect_activations(bitfold: Bitfold, model: Path, quantized: Path, text: Path) -> None:
    args = ("--activations", text, "--context", 32, "--max-tokens", 64)
    result = bitfold("inspect", model, *args, "--json").json
    keys_are_documented("inspect", result)
    assert len(result["models"][0]["inputs"]) == 8
    words = bitfold("inspect", model, quantized, *args).out
    assert re.search(r"^outlier features +0 of 64 dimensions", words, re.M)
    assert re.search(r"^quantized +\d+\.\d +\d+\.\d+ +0", words, re.M)
    several = bitfold("inspect", model, quantized)
    assert several.code == 2
    assert "only with --activations" in several.err


def test_compare_and_report(bitfold: Bitfold, model: Path, text: Path, tmp_path: Path) -> None:
    for bits in (2, 6):
        driver.quantize(model, tmp_path / f"q{bits}", bits=bits, method="rtn")
    runs = (tmp_path / "q6", tmp_path / "q2")
    unmeasured = bitfold("compare", *runs)
    assert unmeasured.code == 2
    assert "--save" in unmeasured.err
    args = ("--reference", model, "--text", text, "--context", 64, "--max-tokens", 128)
    result = bitfold("compare", *runs, *args, "--save", "--json").json
    keys_are_documented("compare", result)
    assert [run["name"] for run in result["runs"]] == ["q2", "q6"]
    shown = bitfold("compare", *runs, "--plot", tmp_path / "pareto.svg")
    assert re.search(r"^q6 .*best at its size$", shown.out, re.M)
    assert (tmp_path / "pareto.svg").stat().st_size > 1000
    page = bitfold("report", *runs, "--output", tmp_path / "r.html", "--json").json
    keys_are_documented("report", page)
    assert page["missing"] is None
    assert bitfold("report", *runs, "-o", tmp_path / "r.html", "--swaps", 3).code == 2
