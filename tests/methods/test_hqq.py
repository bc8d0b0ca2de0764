"""HQQ against its formulas, on 1 to 8 bits; the look-up that makes codebook grids fast."""

from __future__ import annotations

import math

import pytest
import torch

from bitfold.formats import Format, get_format
from bitfold.formats.grids import GRIDS, Grid
from bitfold.methods.fits import hqq, minmax
from bitfold.methods.quantize import quantize_tensor
from bitfold.recipes.catalog import METHODS

P, BETA, GROWTH, ROUNDS = 0.7, 10.0, 1.01, 20


def weights(n: int = 6, k: int = 256, seed: int = 0) -> torch.Tensor:
    """Normal weights with a few far ones, as layers have them."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator) * 0.05
    return torch.where(torch.rand(n, k, generator=generator) < 0.01, 4 * w, w)


def by_the_formulas(group: list[float], bits: int, scale: float, zero: float) -> tuple[float, float]:
    """Zero point and mean absolute error (in steps) after half-quadratic splitting of one group, in double precision.

    q = clip(round(w / s + z)); e = shrink(w / s - (q - z)), the generalised soft threshold; z = mean(q - w / s + e).
    The best of the rounds by the mean absolute error, and none after the first that does not improve.
    """
    best, kept, beta = math.inf, zero, BETA
    for _ in range(ROUNDS):
        codes = [min(max(float(round(w / scale + zero)), 0.0), 2.0**bits - 1) for w in group]
        errors = [w / scale - (q - zero) for w, q in zip(group, codes, strict=True)]
        loss = sum(map(abs, errors)) / len(errors)
        if loss >= best:
            break
        best, kept = loss, zero
        sparse = [math.copysign(max(abs(e) - abs(e) ** (P - 1) / beta, 0.0), e) if e else 0.0 for e in errors]
        zero = sum(q - w / scale + e for q, w, e in zip(codes, group, sparse, strict=True)) / len(group)
        beta *= GROWTH
    return kept, best


@pytest.mark.parametrize("bits", range(1, 9))
def test_zero_points_are_those_of_the_formulas(bits: int) -> None:
    """Group by group. A rounding tie may fall otherwise in float32 and turn the later rounds of a group."""
    format = get_format(METHODS["hqq"].formats[bits])
    assert isinstance(format, Format)
    w = weights()
    start, found = minmax(w, format), hqq(w, format)
    assert torch.equal(start.scale, found.scale)
    assert start.zero_point is not None
    assert found.zero_point is not None
    groups = w.view(6, 4, 64)
    expected = torch.tensor([
        [by_the_formulas(groups[i, j].tolist(), bits, float(start.scale[i, j]), float(z)) for j, z in enumerate(row)]
        for i, row in enumerate(start.zero_point)
    ])  # fmt: skip
    assert ((found.zero_point - expected[..., 0]).abs() < 1e-3).double().mean() > 0.5
    scaled = groups / found.scale[..., None]
    codes = (scaled + found.zero_point[..., None]).round().clamp(0, 2**bits - 1)
    loss = (scaled - codes + found.zero_point[..., None]).abs().mean(-1)
    assert ((loss / expected[..., 1] - 1).abs() < 1e-3).double().mean() > 0.5
    assert abs(float(loss.mean() / expected[..., 1].mean()) - 1) < 0.02


@pytest.mark.parametrize("bits", range(1, 9))
def test_gains_on_every_number_of_bits(bits: int) -> None:
    """In mean absolute error over the ranges' own zero points, group by group never a loss."""
    format, w = get_format(METHODS["hqq"].formats[bits]), weights(32)
    found, ranges = (
        (quantize_tensor(w, format, fit=fit).dequantize() - w).abs().view(32, 4, 64).mean(-1)
        for fit in ("hqq", "minmax")
    )
    assert (found <= ranges * 1.01).all()  # zero points and scales are rounded to 16 bits when stored
    assert found.mean() < ranges.mean()


LOOKED_UP = [g for g in GRIDS.values() if not g.uniform and len(g._boundaries) > 1 and g._cells is not None]


@pytest.mark.parametrize("grid", LOOKED_UP, ids=lambda g: g.name)
def test_look_up_is_search(grid: Grid) -> None:
    """Bit for bit, at the boundaries, just beside them, far outside, and for infinities."""
    edges = grid._boundaries
    beside = [torch.nextafter(edges, torch.tensor(end)) for end in (-math.inf, math.inf)]
    normal = torch.randn(1 << 15, generator=torch.Generator().manual_seed(0)) * min(grid.span[1], 100.0) / 2
    x = torch.cat([normal, edges, *beside, torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e30, -1e30, 1e-40])])
    codes = torch.tensor(grid._order[1], dtype=torch.uint8)[torch.bucketize(x, edges)]
    assert torch.equal(grid.encode(x), codes)
    assert torch.equal(grid.nearest(x.clone()), grid.decode(codes))
    assert grid.encode(torch.full((3,), math.nan)).shape == (3,)  # no crash; NaN is refused before


def test_which_grids_are_looked_up() -> None:
    """NF4, FP4 and 8-bit scales; the boundaries of FP8 crowd around zero."""
    assert {g.name for g in LOOKED_UP} >= {"nf4", "e2m1", "u8-scale"}
    assert GRIDS["e4m3"]._cells is None
