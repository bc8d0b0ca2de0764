"""`bitfold quantize --export compressed-tensors|gptq|awq|auto-round`: one run, a folder that other engines load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bitfold as library
import tiny_lm
from bitfold.checkpoints import open_source
from bitfold.checkpoints.packed import PackedSource
from cli_runs import Bitfold, keys_are_documented

CALIBRATED = ("--nsamples", "2", "--seqlen", "32", "--no-fisher")
WAYS: dict[str, tuple[str, ...]] = {
    "compressed-tensors, 4 bits": ("--bits", "4", *CALIBRATED),
    "compressed-tensors, by energy": ("--bits", "4", "--method", "gptq", "--group-size", "32", *CALIBRATED[:4]),
    "compressed-tensors, zero points": ("--format", "int4-asym-g32", "--method", "rtn"),
    "compressed-tensors, W8A8": ("--bits", "8", "--act", "int8"),
    "compressed-tensors, static": ("--method", "smoothquant", "--bits", "8", "--act", "int8-static", *CALIBRATED[:4]),
    "compressed-tensors, FP8": ("--format", "fp8",),
    "compressed-tensors, MXFP4": ("--format", "mxfp4"),
    "gptq, 4 bits": ("--bits", "4", "--method", "gptq", *CALIBRATED[:4]),
    "gptq, 3 bits": ("--bits", "3", "--group-size", "32", "--method", "rtn"),
    "awq": ("--bits", "4", "--method", "awq", *CALIBRATED[:4]),
    "auto-round": ("--bits", "2", "--method", "rtn"),
}  # fmt: skip
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
def test_a_folder_that_its_reader_runs(bitfold: Bitfold, model: Path, tmp_path: Path, way: str) -> None:
    """Nothing of bitfold's own in config.json; its size is the announced one; the model runs on it."""
    kind, out = way.partition(",")[0], tmp_path / "out"
    said = bitfold("quantize", model, "--export", kind, "-o", out, *WAYS[way], "--json").json
    keys_are_documented("quantize", said)
    assert said["preflight"]["output_bytes"] == sum(f.stat().st_size for f in out.glob("*.safetensors"))
    settings: dict[str, Any] = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == kind
    if kind == "compressed-tensors":  # in which order columns were coded: groups stay where they are
        weights = settings["config_groups"]["group_0"]["weights"]
        assert weights.get("actorder") == ("weight" if "gptq" in WAYS[way] else None)
    source, original = open_source(out), open_source(model)
    assert isinstance(source, PackedSource)
    w, q = original.read(UP).float(), source.read(UP).float()
    assert 0 < float((w - q).square().sum() / w.square().sum()) < 0.2
    with torch.no_grad():
        found = library.load(out)(input_ids=torch.arange(9)[None]).logits
        assert torch.isfinite(found.float()).all()
    assert (out / "tokenizer.json").is_file()


def test_the_preflight_says_who_loads_it(bitfold: Bitfold, model: Path, tmp_path: Path) -> None:
    def engines(kind: str, *words: str) -> dict[str, str]:
        said = bitfold("quantize", model, "--export", kind, *words, "--dry-run", "--json").json
        found: dict[str, str] = said["preflight"]["engines"]
        return found

    assert engines("gptq", "--bits", "4", "--method", "rtn")["vLLM"] == "yes"
    assert engines("gptq", "--format", "int4-asym-g32")["vLLM"].startswith("no: of GPTQ it has symmetric")
    assert "on a GPU" in engines("compressed-tensors", "--format", "nvfp4")["vLLM"]
    assert engines("auto-round", "--bits", "4", "--method", "rtn")["transformers"].endswith("auto-round is installed")


def test_what_does_not_fit_stays_plain_and_is_said(bitfold: Bitfold, tmp_path: Path) -> None:
    """Rows of 96 and of 64: groups of 64 do not divide the former."""
    model = tiny_lm.folder(tmp_path / "m", tiny_lm.model())
    words = ("--export", "gptq", "--bits", "4", "--group-size", "64", "--method", "rtn")
    said = bitfold("quantize", model, *words, "-o", tmp_path / "q", "--json").json
    assert said["preflight"]["substitutes"] == [
        "2 tensors, such as model.layers.0.mlp.down_proj.weight, stay as they are: (64, 96) is no whole number of words"
        " and groups"
    ]
    kept = {t["tensor"] for t in said["tensors"] if t["format"] is None and "down_proj" in t["tensor"]}
    assert len(kept) == 2
    assert "-:^model" in next(iter(json.loads((tmp_path / "q" / "quantize_config.json").read_text())["dynamic"]))


def test_what_is_refused_before_any_work(bitfold: Bitfold, model: Path, tmp_path: Path) -> None:
    for words, code, text in (
        (("--export", "gptq"), 2, "say --bits 4"),
        (("--export", "gptq:Q4"), 2, "cannot export"),
        (("--export", "gptq", "--format", "nf4"), 3, "no format of integers"),
        (("--export", "awq", "--bits", "4", "--transform", "hadamard"), 3, "another basis"),
        (("--export", "awq", "--bits", "3"), 3, "none of those of awq"),
    ):
        done = bitfold("quantize", model, *words, "-o", tmp_path / "out")
        assert done.code == code
        assert text in done.err
        assert not (tmp_path / "out").exists()
