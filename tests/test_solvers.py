"""Laws of the solvers, over the formats that each can code."""

from __future__ import annotations

import pytest
import torch

from bitfold.errors import WeightError
from bitfold.formats import FORMATS, get_format
from bitfold.methods import quantize_tensor
from bitfold.solvers.ldlq import _factor, proxy_loss

COLUMN_FORMATS = [name for name, f in FORMATS.items() if hasattr(f, "coder")]
_TRELLIS = [name for name in COLUMN_FORMATS if name.startswith("trellis")]
_FEW = ["int4-asym-g64", "int3", "nf4", "mxfp4", "int2-affine-g64", *_TRELLIS]


def problem(n: int = 48, k: int = 192, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) * torch.linspace(2, 0.1, k)
    x = torch.randn(4 * k, k, generator=generator) @ mix
    return torch.randn(n, k, generator=generator), x.T @ x / len(x)


@pytest.mark.parametrize("name", COLUMN_FORMATS)
def test_without_correlation_ldlq_is_rounding(name: str) -> None:
    """H = c I: there is nowhere to put the error, and the bytes are those of rtn (scales apart, which are refitted)."""
    w = problem()[0]
    plain = quantize_tensor(w, name, solver="rtn", fit="minmax")
    fed = quantize_tensor(w, name, solver="ldlq", fit="minmax", hessian=None)
    assert all(torch.equal(fed.fields[field], plain.fields[field]) for field in plain.fields)
    scaled = quantize_tensor(w, name, solver="ldlq", fit="minmax", hessian=3 * torch.eye(w.shape[1]))
    for field in set(plain.fields) - {"scale"}:
        assert torch.equal(scaled.fields[field], plain.fields[field])


@pytest.mark.parametrize("name", _FEW)
def test_loss_falls(name: str) -> None:
    """Under correlated inputs, by a margin: less than two thirds of what rounding loses."""
    w, hessian = problem()
    losses = [
        proxy_loss(w, quantize_tensor(w, name, solver=s, fit="mse", hessian=hessian).dequantize(), hessian)
        for s in ("ldlq", "rtn")
    ]
    assert losses[0] < 0.67 * losses[1]


@pytest.mark.parametrize("done", [1, 3, 5])
def test_the_rest_is_the_least_squares_minimiser(done: int) -> None:
    """After `done` columns are fixed, the other columns are where the loss is least: checked with an exact inverse."""
    k = 8
    w, hessian = problem(3, k)
    factor, _ = _factor(hessian, k, 0.01)
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(k)
    q, work = torch.zeros_like(w), w.clone()
    for i in range(done):
        q[:, i] = work[:, i].round()
        error = (work[:, i] - q[:, i]) / factor[i, i]
        work[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
    rest, fixed = slice(done, k), slice(0, done)
    # minimise over d: [e d] H [e d]^T with e given: d = -e H_fr H_rr^-1
    error = (w[:, fixed] - q[:, fixed]).double()
    best = w[:, rest].double() + error @ damped[fixed, rest] @ torch.linalg.inv(damped[rest, rest])
    assert torch.allclose(work[:, rest].double(), best, atol=1e-4 * float(w.abs().max()))


@pytest.mark.parametrize("solver", ["rtn", "ldlq"])
@pytest.mark.parametrize("name", ["int4-asym-g64", "trellis-2"])
def test_same_seed_same_bytes(solver: str, name: str) -> None:
    """Whatever the number of threads."""
    w, hessian = problem()
    threads = torch.get_num_threads()
    first = quantize_tensor(w, name, solver=solver, hessian=hessian, seed=1)
    torch.set_num_threads(3 - min(threads, 2))  # one if there were more, else two
    second = quantize_tensor(w, name, solver=solver, hessian=hessian, seed=1)
    torch.set_num_threads(threads)
    assert all(torch.equal(first.fields[f], second.fields[f]) for f in first.fields)


def test_dead_and_singular_hessians() -> None:
    """Inputs that are always zero, fewer samples than inputs, all zero; NaN is refused."""
    w, hessian = problem()
    dead = hessian.clone()
    dead[5], dead[:, 5] = 0, 0
    assert torch.isfinite(quantize_tensor(w, "int4-g64", solver="ldlq", hessian=dead).dequantize()).all()
    one = torch.ones(192, 192)
    assert torch.isfinite(quantize_tensor(w, "int4-g64", solver="ldlq", hessian=one).dequantize()).all()
    nothing = quantize_tensor(w, "int4-g64", solver="ldlq", hessian=torch.zeros(192, 192))
    assert torch.isfinite(nothing.dequantize()).all()
    with pytest.raises(WeightError, match="not finite"):
        quantize_tensor(w, "int4-g64", solver="ldlq", hessian=hessian * float("nan"))


def test_odd_widths() -> None:
    """Rows that are no multiple of the block, the outer block or the tile."""
    for k in (1, 3, 127, 130, 201):
        w, hessian = problem(5, k)
        q = quantize_tensor(w, get_format("int4"), solver="ldlq", fit="mse", hessian=hessian)
        assert proxy_loss(w, q.dequantize(), hessian) < 0.05
