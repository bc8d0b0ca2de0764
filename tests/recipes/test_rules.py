"""Requests that would lose something silently are refused, and fits do what they are asked for."""

from __future__ import annotations

import pytest
import torch

from bitfold.errors import RecipeError, UsageError
from bitfold.methods.quantize import quantize_tensor
from bitfold.models.swap import quantize_
from bitfold.recipes.recipe import Rule


def test_plain_dtypes_know_no_transform_and_no_activations() -> None:
    for options in ({"transform": "hadamard"}, {"act": "int8"}):
        with pytest.raises(RecipeError, match="ordinary tensors"):
            Rule("*", "fp16", **options)
    with pytest.raises(UsageError, match="ordinary dtype"):
        quantize_(torch.nn.Sequential(torch.nn.Linear(8, 8)), "fp16")


@pytest.mark.parametrize("format", ["int4-asym-g64", "int3-asym-g64", "int4-affine-g64", "nf4"])
def test_hqq_is_not_minmax(format: str) -> None:
    """It moves the scales or zero points, and gains in mean absolute error on normal weights."""
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    loss = [(quantize_tensor(w, format, fit=f).dequantize() - w).abs().mean() for f in ("hqq", "minmax")]
    assert loss[0] < loss[1]
