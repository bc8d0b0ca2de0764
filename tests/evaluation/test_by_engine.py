"""Predictions by the native engine are those of transformers' layers, and only where nothing else was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import bitfold
import tiny_lm
from bitfold.evaluation import reading
from bitfold.evaluation.by_engine import by_engine
from bitfold.models.swap import quantize_
from bitfold.recipes.recipe import Recipe, Rule
from bitfold.system import native
from small_decoders import CONFIGS, build

pytestmark = pytest.mark.skipif(native.core() is None, reason="the engine is native")


def quantized(act: str = "float", name: str | None = None) -> nn.Module:
    made = tiny_lm.model() if name is None else build(name)
    quantize_(made, Recipe((Rule("*", "int4-asym-g32", act=act),)))
    return made.float()


@pytest.mark.parametrize("sizes", [{"context": 64}, {"context": 48, "stride": 16}, {"context": 100, "batch": 3}])
def test_figures_are_those_of_transformers_layers(sizes, monkeypatch):
    made, reference = quantized(), tiny_lm.model()
    assert by_engine(made, 64, 16) is not None
    asked: dict[str, Any] = {"text": tiny_lm.TEXT, "max_tokens": 600, "tokenizer": tiny_lm.tokenizer(), **sizes}
    ours = bitfold.evaluate(made, reference, **asked)
    monkeypatch.setattr(reading, "by_engine", lambda *_: None)
    theirs = bitfold.evaluate(made, reference, **asked)
    assert ours.perplexity == pytest.approx(theirs.perplexity, rel=1e-3)
    assert ours.kl_mean == pytest.approx(theirs.kl_mean, rel=1e-2, abs=1e-5)
    assert ours.tokens == theirs.tokens


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_logits_of_every_family(name):
    made = quantized(name=name)
    reader = by_engine(made, 90, 16)
    assert reader is not None
    ids = torch.randint(3, 300, (2, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = made(input_ids=ids).logits
    with reader.run(ids) as rows:
        starts = range(7, 90, 16)
        found = torch.stack([torch.cat([rows(row, i, min(90, i + 16)) for i in starts]) for row in range(2)])
    errors = (found - expected[:, 7:]).abs().amax(-1) / expected.abs().max()
    # Where two experts are as good as each other, a rounding error sends a token to the one or the other.
    assert (errors <= 5e-3).float().mean() >= (0.95 if "moe" in name or name == "mixtral" else 1.0)


def test_what_was_asked_for_otherwise_goes_on_through_the_layers():
    assert by_engine(tiny_lm.model(), 64, 16) is None  # nothing quantized
    assert by_engine(quantized("int8"), 64, 16) is None
    assert by_engine(quantized().bfloat16(), 64, 16) is None
    watched: Any = quantized()
    watched.model.layers[0].register_forward_hook(lambda *_: None)
    assert by_engine(watched, 64, 16) is None
    other: Any = quantized()
    other.config.hidden_act = "relu"
    assert by_engine(other, 64, 16) is None
