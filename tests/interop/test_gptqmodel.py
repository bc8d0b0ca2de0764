"""GPTQModel's kernels in transformers load what is written as GPTQ and AWQ, and compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import bitfold
from interop_engines import in_transformers, model, python_of, same

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "v1, 4 bits": ("gptq", {"bits": 4, "group_size": 32}),
    "v1, 8 bits": ("gptq", {"bits": 8}),
    "v1, 3 bits": ("gptq", {"bits": 3, "group_size": 32}),
    "v1, 2 bits": ("gptq", {"bits": 2, "group_size": 32}),
    "v2, zero points": ("gptq", {"format": "int4-asym-g32"}),
    "awq": ("awq", {"bits": 4, "group_size": 32}),
}


@pytest.mark.parametrize("way", WAYS)
def test_logits(tmp_path: Path, way: str) -> None:
    python, (kind, said) = python_of("gptqmodel"), WAYS[way]
    source = model(tmp_path / "m")
    bitfold.quantize(source, tmp_path / "q", export=kind, method="rtn", **said)
    found = in_transformers(python, tmp_path / "q", tmp_path, imports="import gptqmodel", dtype="float16")
    assert any("Linear" in kind and kind != "Linear" for kind in found["kinds"]), found["kinds"]
    same(found["logits"], tmp_path / "q", "float16")
