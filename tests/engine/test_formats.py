"""Which formats the engine has loops for: a law over the registry, so that a new one is decided about."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_lm
from bitfold.engine import Sampling, Writer
from bitfold.engine.plan import _LOOPS
from bitfold.formats import FORMATS
from bitfold.models.save import save
from bitfold.models.swap import quantize_
from bitfold.qtensor import QTensor
from bitfold.recipes.recipe import Recipe
from bitfold.system import native, progress

pytestmark = pytest.mark.skipif(native.core() is None, reason="the engine is native")

# A code of 8 bits that is no integer would be looked up, which the loops do for up to 4 bits; codebooks have no
# loops here; ggml's other ternary type is packed by powers of three, and its vector types have tables.
WITHOUT = {
    *("fp8-e4m3", "fp8-e4m3-tensor", "fp8-e5m2", "mxfp8", "mxfp8-e5m2"),
    *("aqlm-1x8", "aqlm-2x8", "aqlm-3x8", "aqlm-4x8", "tq1_0"),
    *("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq1_s", "iq1_m"),
}
PAGE = Path(__file__).parents[2] / "docs" / "engine.md"


@pytest.mark.parametrize("act", ["float", "int8"])
@pytest.mark.parametrize("name", [name for name, f in FORMATS.items() if not f.plain])
def test_every_format_has_loops_or_is_named(name, act):
    format, shape = FORMATS[name], (64, 256)
    fields = {field: torch.zeros(i.shape, dtype=i.dtype) for field, i in format.layout(shape).items()}
    runs = any(kernel.accepts(QTensor(format, shape, fields), act) for kernel in _LOOPS)
    assert runs == (name not in WITHOUT)


def test_the_page_names_them():
    (line,) = re.findall(r"^Not yet: .*?\n\n", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    for name in WITHOUT:
        family = name.split("-")[0]
        assert f"`{family}`" in line, name


@pytest.mark.parametrize("name", ["fp8-e4m3", "aqlm-1x8"])
def test_what_has_none_is_written_by_transformers_and_one_line_says_why(name, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(progress, "say", said.append)
    made: Any = tiny_lm.model()
    quantize_(made, Recipe.of(name))
    save(made, tmp_path / "m")
    tiny_lm.tokenizer().save_pretrained(tmp_path / "m")
    assert Writer.open(tmp_path / "m").write("the quick", Sampling(3)).tokens == 3
    assert [line for line in said if name in line and "slower" in line] == said[-1:]
