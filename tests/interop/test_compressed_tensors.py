"""compressed-tensors in transformers loads what is written for it, and computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import bitfold
from interop_engines import in_transformers, model, python_of, same

WAYS: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4},
    "4 bits, groups of 32": {"bits": 4, "group_size": 32},
    "2 bits": {"bits": 2, "group_size": 32},
    "8 bits": {"bits": 8},
    "FP8, rows": {"format": "fp8-e4m3"},
    "FP8, tensor": {"format": "fp8-e4m3-tensor"},
    "MXFP4": {"format": "mxfp4"},
    "NVFP4": {"format": "nvfp4"},
}
# Zero points: compressed-tensors 0.20 makes places for them unpacked and refuses packed ones (`compress` on the meta
# device); vLLM reads them, see test_vllm.py.
# Decoded by compressed-tensors in bfloat16, whatever the model's dtype.
COARSE = ("MXFP4", "NVFP4")


@pytest.mark.parametrize("way", WAYS)
def test_logits(tmp_path: Path, way: str) -> None:
    python = python_of("compressed-tensors")
    source = model(tmp_path / "m")
    bitfold.quantize(source, tmp_path / "q", export="compressed-tensors", method="rtn", **WAYS[way])
    dtype = "bfloat16" if way in COARSE else "float32"
    same(in_transformers(python, tmp_path / "q", tmp_path, dtype=dtype)["logits"], tmp_path / "q", dtype)
