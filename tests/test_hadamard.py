"""Rotations are orthogonal, fast to write down, and change nothing but the basis."""

from __future__ import annotations

import pytest
import torch

from bitfold.transforms import Hadamard, read_transform
from bitfold.transforms.hadamard import factors

SIZES = [1, 2, 3, 4, 12, 20, 28, 36, 64, 96, 100, 576, 1000, 1536, 4096, 8960, 11008, 14336]


@pytest.mark.parametrize("size", SIZES)
def test_orthogonal(size: int) -> None:
    """R R^T = I to rounding: each output is a sum of `size` products, in float64."""
    rotation = Hadamard(size, seed=3)
    x = torch.randn(8, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    bound = 64 * torch.finfo(torch.float64).eps * x.norm(dim=1).max()
    assert (rotation.inverse(rotation(x)) - x).abs().max() <= bound + 1e-6 * x.abs().max()
    assert torch.allclose(rotation(x) @ rotation(x).T, x @ x.T, rtol=1e-5, atol=1e-5 * float((x @ x.T).max()))


@pytest.mark.parametrize("size", [12, 20, 28, 36, 64, 576, 1536, 14336, 8960])
def test_every_input_spreads_over_all_outputs(size: int) -> None:
    """All entries of the matrix have the same magnitude: it is a Hadamard matrix, not blocks of one."""
    row = Hadamard(size)(torch.eye(size, dtype=torch.float64)[size // 3])
    assert torch.allclose(row.abs(), torch.full_like(row, size**-0.5), rtol=1e-5)


def test_the_product_does_not_change() -> None:
    """x W^T = (x R)(W R)^T, and the Hessian turns along."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(50, 576, generator=generator), torch.randn(40, 576, generator=generator)
    rotation = Hadamard(576, seed=7)
    y = x.double() @ w.double().T
    bound = 576 * torch.finfo(torch.float32).eps * (x.abs().double() @ w.abs().double().T)
    assert ((rotation(x) @ rotation(w).T).double() - y).abs().max() <= bound.max()
    turned = rotation.hessian((x.T @ x).double())
    assert torch.allclose(turned, rotation(x).double().T @ rotation(x).double(), rtol=1e-4, atol=1e-2)


def test_seeds_are_stored() -> None:
    """The description is enough; other seeds give other signs."""
    x = torch.randn(3, 96)
    assert torch.equal(read_transform(Hadamard(96, 5).describe())(x), Hadamard(96, 5)(x))
    assert not torch.equal(Hadamard(96, 6)(x), Hadamard(96, 5)(x))
    assert len(factors(14336)) > 1
