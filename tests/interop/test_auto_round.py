"""AutoRound in transformers loads its container, mixed bits included, and computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest

import bitfold
from interop_engines import in_transformers, model, python_of, same

DOWN = bitfold.Rule("*down_proj*", "int8-g32")
RECIPES = {
    "4 bits": bitfold.Recipe((bitfold.Rule("*", "int4-g32"),)),
    "mixed": bitfold.Recipe((DOWN, bitfold.Rule("*", "int4-g32"))),
    "some plain": bitfold.Recipe((bitfold.Rule("*down_proj*"), bitfold.Rule("*", "int4-g32"))),
    "2 bits": bitfold.Recipe((DOWN, bitfold.Rule("*", "int2-g32"))),
}


@pytest.mark.parametrize("way", RECIPES)
def test_logits(tmp_path: Path, way: str) -> None:
    python = python_of("auto-round")
    source = model(tmp_path / "m")
    bitfold.quantize(source, tmp_path / "q", export="auto-round", recipe=RECIPES[way])
    found = in_transformers(python, tmp_path / "q", tmp_path, imports="import auto_round")
    same(found["logits"], tmp_path / "q", "float16")
