"""Rotations are orthogonal, fast to write down, and change nothing but the basis."""

from __future__ import annotations

import pytest
import torch

from bitfold.system import native
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


def exact(rotation: Hadamard, x: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
    """By the factors, in float64: those are float32 numbers, each off by eps, hence their signs."""
    return rotation.inverse(x.double()) if inverse else rotation(x.double())


def check_rotated(found: torch.Tensor, rotation: Hadamard, x: torch.Tensor, unit: float = 0.0) -> None:
    """Against float64: every output is a sum of at most 96 numbers, in whatever order; `unit` is of the result."""
    want = exact(rotation, x)
    bound = 2.0**-24 * (x.shape[-1] + 8) * x.double().abs().sum(-1, keepdim=True) + unit * want.abs()
    assert bool(((found.double() - want).abs() <= bound).all())


@pytest.mark.parametrize("size", SIZES)
def test_the_core_rotates_within_the_bound_and_to_the_same_bits(size: int) -> None:
    """Each output is a signed sum of `block` terms: at most log2(width) + order + 2 roundings of partial sums, each of
    which is at most sum |x| / sqrt(block), and two more for the factors of `exact`."""
    core = native.core()
    if core is None:
        pytest.skip("no native core in this installation")
    parts = [len(h) for h in factors(size)]
    roundings = sum(n if n & (n - 1) else n.bit_length() - 1 for n in parts) + 4
    rotation, before = Hadamard(size, seed=11), core.isa()
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(size))
    block = int(torch.tensor(parts or [1]).prod())
    largest = x.double().abs().view(-1, block).sum(1).view(3, -1).amax(1, keepdim=True) / block**0.5
    bound = 2.0**-24 * roundings * largest
    outcomes = []
    try:
        for isa in core.isas():
            assert core.set_isa(isa)
            outcomes.append(torch.cat([rotation(x), rotation.inverse(x)]))
            assert ((rotation(x).double() - exact(rotation, x)).abs() <= bound).all()
            assert ((rotation.inverse(x).double() - exact(rotation, x, inverse=True)).abs() <= bound).all()
    finally:
        core.set_isa(before)
    assert all(torch.equal(outcomes[0], other) for other in outcomes)


def test_rotations_take_any_layout_and_have_gradients() -> None:
    """Not contiguous, empty, narrow dtypes; the gradient is the inverse."""
    rotation = Hadamard(96, seed=2)
    x = torch.randn(96, 5, generator=torch.Generator().manual_seed(0)).T
    check_rotated(rotation(x), rotation, x)
    check_rotated(rotation(x.contiguous()), rotation, x)
    assert rotation(torch.empty(2, 0, 96)).shape == (2, 0, 96)
    for dtype in (torch.bfloat16, torch.float16):
        assert rotation(x.to(dtype)).dtype == dtype
        unit = torch.finfo(dtype).eps / 2  # rounded once, at the end
        check_rotated(rotation(x.to(dtype)), rotation, x.to(dtype), unit)
    assert not torch.isfinite(rotation(torch.full((1, 96), float("nan")))).any()
    leaf = x.contiguous().requires_grad_()
    grad = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    rotation(leaf).backward(grad)
    assert torch.allclose(leaf.grad, rotation.inverse(grad), rtol=0, atol=1e-6)


def test_torch_compile_sees_the_rotation_as_one_operator() -> None:
    """And opcheck has nothing to say against it."""
    if native.core() is None:
        pytest.skip("no native core in this installation")
    rotation, x = Hadamard(96, seed=2), torch.randn(3, 96)
    compiled = torch.compile(lambda v: rotation(v) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), rotation(x) * 2)
    torch.library.opcheck(torch.ops.bitfold.hadamard.default, (x.requires_grad_(), 96, 2, False))
