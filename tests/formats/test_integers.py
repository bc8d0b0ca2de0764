"""Rounding to integers in the native core and in PyTorch: every code is the nearest to what it aimed at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bitfold.errors import FormatError
from bitfold.formats import FORMATS, get_format
from bitfold.formats import integers as rounding
from bitfold.methods.fits import get_fit
from bitfold.methods.gptq import factor, ldlq
from bitfold.methods.pruning import Fixed
from bitfold.methods.quantize import quantize_tensor
from bitfold.system import native
from numerics import check_same_codes

INTEGERS = [name for name, f in FORMATS.items() if f.grid and f.grid.uniform and f.scale]
SIDES = ["native", "torch"]
DAMP = 0.01


@pytest.fixture(params=SIDES)
def side(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the core and without."""
    if request.param == "torch":
        monkeypatch.setenv("BITFOLD_NATIVE", "0")
    elif native.core() is None:
        pytest.skip("no native core")
    return str(request.param)


def problem(n: int = 70, k: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight whose rows and columns fill no vector, and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(k, k, generator=generator) * torch.linspace(2, 0.1, k)
    x = torch.randn(3 * k, k, generator=generator) @ mix
    return torch.randn(n, k, generator=generator), x.T @ x / len(x)


def aims(w: torch.Tensor, q: torch.Tensor, hessian: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """float64: what each weight should have aimed at, given the errors of the columns coded before it."""
    upper = factor(hessian, DAMP, order).double()
    error = (w - q).double()[:, order]
    wanted = w.double()[:, order] + (error @ (upper - upper.diagonal().diag())) / upper.diagonal()
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return wanted[:, back]


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("by_energy", [False, True])
@pytest.mark.usefixtures("side")
def test_every_code_is_the_nearest_to_its_aim(name: str, by_energy: bool) -> None:
    """In units of the step, at most half of one away, or at the end of the grid; to the rounding of the sums."""
    w, hessian = problem()
    format: Any = get_format(name)
    k = w.shape[1]
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if by_energy else torch.arange(k)
    q = ldlq(w, hessian, format, get_fit("mse"), by_energy=by_energy, refit=False)
    params, blocks = (
        format.load_params({f: v for f, v in q.fields.items() if f != "codes"}, q.shape),
        format.blocks(q.shape),
    )
    rows, columns = torch.arange(len(w)) // blocks.rows, torch.arange(k) // blocks.cols
    scale = params.scale[rows][:, columns].double()
    zero = 0.0 if params.zero_point is None else params.zero_point[rows][:, columns].double()
    decoded = q.dequantize()
    low, high = format.grid.span
    x = aims(w, decoded, hessian, order) / scale + zero
    missed = (x.clamp(low, high) - (decoded.double() / scale + zero)).abs()
    # k products and sums in float32 on the way to the aim, one rounding of the decoded value
    slack = 4 * k * torch.finfo(torch.float32).eps * (1 + x.abs())
    assert bool((missed <= 0.5 + slack).all()), float((missed - slack).max())


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("fit", ["mse", "minmax"])
def test_the_same_bytes_without_the_core(name: str, fit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding to nearest; with feedback, the codes, which products of PyTorch's lie between."""
    if native.core() is None:
        pytest.skip("no native core")
    w, hessian = problem()
    format, chosen = get_format(name), get_fit(fit)
    one, other = (quantize_tensor(w, format, fit=fit) for _ in _both(monkeypatch))
    assert all(torch.equal(one.fields[field], other.fields[field]) for field in one.fields)
    one, other = (ldlq(w, hessian, format, chosen) for _ in _both(monkeypatch))
    check_same_codes(one.fields["codes"], other.fields["codes"])


@pytest.mark.parametrize("rows", [1, 63, 130])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("pruned", [False, True])
def test_columns_are_fed_to_the_same_bytes_without_the_core(
    rows: int, shifted: bool, pruned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same sums in the same order: codes, decoded weights and errors."""
    if native.core() is None:
        pytest.skip("no native core")
    count, generator = 40, torch.Generator().manual_seed(rows)
    target, carried, room = (torch.randn(count, rows, generator=generator) for _ in range(3))
    lower = torch.randn(count, count, generator=generator).tril() + 3 * torch.eye(count)
    places = torch.randperm(64, generator=generator)[:count]
    kept = room > -0.5 if pruned else None
    scale = torch.rand(2, rows, generator=generator) * 0.3
    zero = torch.randn(2, rows, generator=generator) if shifted else None
    scales = rounding.Scales((-8.0, 7.0), 32, scale, zero)
    outcomes = []
    for _ in _both(monkeypatch):
        codes = torch.zeros(64, rows, dtype=torch.uint8)
        fed = [torch.zeros(count, rows) for _ in range(2)]
        rounding.feed(rounding.FeedbackColumns(places, lower, target, carried, kept, *fed), scales, codes)
        outcomes.append([codes, *fed])
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


def _both(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With the core, then without."""
    for side in SIDES:
        monkeypatch.setenv("BITFOLD_NATIVE", str(int(side == "native")))
        yield side


@pytest.mark.parametrize("length", [1, 15, 16, 64, 100])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("span", [(-8.0, 7.0), (0.0, 3.0), (-128.0, 127.0)])
def test_errors_of_blocks(length: int, shifted: bool, span: tuple[float, float]) -> None:
    """Against float64 arithmetic on the same codes; a scale of zero decodes to zero."""
    if native.core() is None:
        pytest.skip("no native core")
    generator = torch.Generator().manual_seed(length)
    w = torch.randn(33, 5, length, generator=generator)
    scale = torch.rand(33, 5, generator=generator) * 0.5
    scale[::7] = 0
    zero = torch.randn(33, 5, generator=generator) if shifted else None
    inverse = torch.where(scale == 0, 0.0, 1 / scale)[..., None]
    shift = torch.zeros(()) if zero is None else zero[..., None]
    points = (w * inverse + shift).round().clamp(*span)
    exact = ((points.double() - shift) * scale[..., None] - w).square().mean(-1)
    found = rounding.block_errors(w, scale, zero, span)
    # A difference of numbers below 2^8 steps, squared and summed: relative to the largest of them.
    size = (points.abs().amax(-1) + (0 if zero is None else zero.abs())) * scale + w.abs().amax(-1)
    bound = (length + 8) * torch.finfo(torch.float32).eps * size.square()
    assert bool(((found - exact).abs() <= bound).all())


@pytest.mark.usefixtures("side")
def test_pruned_weights_stay_zero() -> None:
    """And a grid without a zero is refused."""
    w, hessian = problem(64, 128)
    gone = (torch.arange(64)[:, None] + torch.arange(128)) % 2 == 1
    q = ldlq(w, hessian, get_format("int4-g64"), get_fit("mse"), pruner=Fixed(~gone)).dequantize()
    assert bool((q[gone] == 0).all())
    assert float((q[~gone] == 0).double().mean()) < 0.2
    with pytest.raises(FormatError, match="no zero"):
        ldlq(w, hessian, get_format("int3-affine-g64"), get_fit("mse"), pruner=Fixed(~gone))
