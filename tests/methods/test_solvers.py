"""Laws of the solvers, over the formats that each can code."""

from __future__ import annotations

import pytest
import torch

from bitfold.errors import WeightError
from bitfold.formats import FORMATS, get_format
from bitfold.methods.fits import get_fit
from bitfold.methods.gptq import _coded, _diagonal_inverses, _factored, factor, ldlq, proxy_loss
from bitfold.methods.hessian import BlockDiagonal
from bitfold.methods.quantize import quantize_tensor
from bitfold.qtensor import rows_stack, split_rows

# Blocks of ggml choose their scales under the data, and hold them beside the codes: test_ggml_feedback.py.
COLUMN_FORMATS = [name for name, f in FORMATS.items() if f.coder and f.ggml is None]
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
    plain = quantize_tensor(w, name, method="rtn", fit="minmax")
    fed = quantize_tensor(w, name, method="ldlq", fit="minmax", hessian=None)
    assert all(torch.equal(fed.fields[field], plain.fields[field]) for field in plain.fields)
    scaled = quantize_tensor(w, name, method="ldlq", fit="minmax", hessian=3 * torch.eye(w.shape[1]))
    for field in set(plain.fields) - {"scale"}:
        assert torch.equal(scaled.fields[field], plain.fields[field])


@pytest.mark.parametrize("name", _FEW)
def test_loss_falls(name: str) -> None:
    """Under correlated inputs, by a margin: less than two thirds of what rounding loses."""
    w, hessian = problem()
    losses = [
        proxy_loss(w, quantize_tensor(w, name, method=s, fit="mse", hessian=hessian).dequantize(), hessian)
        for s in ("ldlq", "rtn")
    ]
    assert losses[0] < 0.67 * losses[1]


class Recorder:
    """A coder that rounds to integers and remembers what it was asked to code."""

    step = 1
    at_once = 0
    feed = under = None

    def __init__(self) -> None:
        self.asked: dict[int, torch.Tensor] = {}

    def encode(self, w: torch.Tensor, start: int) -> torch.Tensor:
        self.asked[start] = w[:, 0].clone()
        return w.round()


@pytest.mark.parametrize("by_energy", [False, True])
@pytest.mark.parametrize("done", [1, 3, 5])
def test_the_next_column_aims_at_the_least_squares_minimiser(done: int, by_energy: bool) -> None:
    """With the columns before it fixed, a column aims at its place in the best continuation: an exact inverse says."""
    k = 8
    w, hessian = problem(3, k)
    coder = Recorder()
    found = _factored(slice(0, k), hessian, 0.01, 1, int(by_energy))
    order = found.order
    q = _coded(w, [found], coder, None)
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(k)
    fixed, rest = order[:done], order[done:]
    # minimise over d: [e d] H [e d]^T with the error e given: d = -e H_fr H_rr^-1, and the rest aims at w - d
    error = (w[:, fixed] - q[:, fixed]).double()
    best = w[:, rest].double() + error @ damped[fixed][:, rest] @ torch.linalg.inv(damped[rest][:, rest])
    assert torch.allclose(coder.asked[int(rest[0])].double(), best[:, 0], atol=1e-4 * float(w.abs().max()))
    assert sorted(coder.asked) == list(range(k))


@pytest.mark.parametrize("name", ["int3-asym-g64", "trellis-2"])
def test_order_by_energy(name: str) -> None:
    """Only the order changes: every column is coded in its own place, under its own scale, and the loss stays low."""
    w, hessian = problem()
    mixed = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(1))
    hessian = hessian[mixed][:, mixed]
    fit, format = get_fit("mse"), get_format(name)
    plain, ordered = (ldlq(w, hessian, format, fit, by_energy=b) for b in (False, True))
    assert not torch.equal(plain.dequantize(), ordered.dequantize())
    assert proxy_loss(w, ordered.dequantize(), hessian) < 1.1 * proxy_loss(w, plain.dequantize(), hessian)


@pytest.mark.parametrize("solver", ["rtn", "ldlq"])
@pytest.mark.parametrize("name", ["int4-asym-g64", "trellis-2"])
def test_same_seed_same_bytes(solver: str, name: str) -> None:
    """Rounding: whatever the number of threads. Feedback goes through products of PyTorch's: to a tie, then."""
    w, hessian = problem()
    threads = torch.get_num_threads()
    first, second = (quantize_tensor(w, name, method=solver, hessian=hessian, seed=1) for _ in range(2))
    assert all(torch.equal(first.fields[f], second.fields[f]) for f in first.fields)
    try:
        torch.set_num_threads(3 - min(threads, 2))  # one if there were more, else two
        other = quantize_tensor(w, name, method=solver, hessian=hessian, seed=1)
    finally:
        torch.set_num_threads(threads)
    if solver == "rtn":
        assert all(torch.equal(first.fields[f], other.fields[f]) for f in first.fields)
    losses = [proxy_loss(w, q.dequantize(), hessian) for q in (first, other)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_dead_and_singular_hessians() -> None:
    """Inputs that are always zero, fewer samples than inputs, all zero; NaN is refused."""
    w, hessian = problem()
    dead = hessian.clone()
    dead[5], dead[:, 5] = 0, 0
    assert torch.isfinite(quantize_tensor(w, "int4-g64", method="ldlq", hessian=dead).dequantize()).all()
    one = torch.ones(192, 192)
    assert torch.isfinite(quantize_tensor(w, "int4-g64", method="ldlq", hessian=one).dequantize()).all()
    nothing = quantize_tensor(w, "int4-g64", method="ldlq", hessian=torch.zeros(192, 192))
    assert torch.isfinite(nothing.dequantize()).all()
    with pytest.raises(WeightError, match="not finite"):
        quantize_tensor(w, "int4-g64", method="ldlq", hessian=hessian * float("nan"))


@pytest.mark.parametrize("name", [n for n in COLUMN_FORMATS if get_format(n).rescaled])
def test_the_refit_changes_nothing_but_scales(name: str) -> None:
    """No row loses more than the rounding of its scales to 16 bits costs, and together they gain."""
    w, hessian = problem()
    refitted, plain = (ldlq(w, hessian, get_format(name), get_fit("minmax"), refit=refit) for refit in (True, False))
    changed = {f for f in plain.fields if not torch.equal(plain.fields[f], refitted.fields[f])}
    assert changed <= {"scale", "zero"}
    before, after = (((e @ hessian) * e).sum(1) for e in (w - plain.dequantize(), w - refitted.dequantize()))
    # A bf16 scale is off by 2^-9 of itself at most, each group by its own; groups have 16 weights at least.
    parts = refitted.dequantize().view(len(w), -1, 16)
    blocks = torch.stack([hessian[i : i + 16, i : i + 16] for i in range(0, w.shape[1], 16)])
    rounding = 2**-9 * torch.einsum("rgi,gij,rgj->rg", parts, blocks, parts).clamp_min(0).sqrt().sum(1)
    assert bool((after.sqrt() <= before.sqrt() + rounding).all())
    assert float(after.sum()) <= float(before.sum())


@pytest.mark.parametrize(("step", "k"), [(1, 7), (4, 192), (4, 190), (8, 60)])
def test_blocks_of_the_diagonal_are_inverted(step: int, k: int) -> None:
    """Each from its own corner, the last one perhaps smaller; of the factor as it lies in memory, transposed."""
    lower = factor(problem(k=k)[1], 0.01).T
    found = _diagonal_inverses(lower, step)
    assert list(found) == list(range(0, k, step))
    for at, inverse in found.items():
        block = lower[at : at + step, at : at + step]
        assert torch.allclose(inverse.double() @ block.double(), torch.eye(len(block)).double(), atol=1e-4)


@pytest.mark.parametrize("parts", [(1,), (1500,), (1024, 300, 1100)])
def test_loss_is_the_quadratic_form(parts: tuple[int, ...]) -> None:
    """Against float64, for a matrix and for squares of it, below and above the columns that are taken at a time."""
    w, k = torch.randn(5, sum(parts)), sum(parts)
    q = w + 0.3 * torch.randn(5, k)
    blocks = [(x := torch.randn(2 * size, size)).T @ x / (2 * size) for size in parts]
    whole = torch.block_diag(*blocks).double()
    wanted = [float(((e.double() @ whole) * e.double()).sum()) for e in (w - q, w)]
    hessian = blocks[0] if len(parts) == 1 else BlockDiagonal(tuple(blocks))
    rounding = 4 * k * torch.finfo(torch.float32).eps
    assert proxy_loss(w, q, hessian) == pytest.approx(wanted[0] / wanted[1], rel=rounding)


def test_odd_widths() -> None:
    """Rows that are no multiple of the block, the outer block or the tile."""
    for k in (1, 3, 127, 130, 201):
        w, hessian = problem(5, k)
        q = quantize_tensor(w, get_format("int4"), method="ldlq", fit="mse", hessian=hessian)
        assert proxy_loss(w, q.dequantize(), hessian) < 0.05


@pytest.mark.parametrize("name", [name for name, f in FORMATS.items() if hasattr(f, "encode") and f.scale is not None])
def test_stacked_weights_come_apart(name: str) -> None:
    """Where a format says that rows stack, the parts of the whole are, byte for byte, the weights by themselves."""
    format = get_format(name)
    parts = [torch.randn(n, 256, generator=torch.Generator().manual_seed(n)) * n for n in (128, 64, 33)]
    shapes = [(len(p), p.shape[1]) for p in parts]
    whole_only = {"int8-tensor", "fp8-e4m3-tensor", "ternary-tensor", "nvfp4"}  # one scale for the whole weight
    assert rows_stack(format, shapes) == (name not in whole_only)
    if name in whole_only:
        return
    whole = quantize_tensor(torch.cat(parts), name, fit="absmax")
    for part, found in zip(parts, split_rows(whole, shapes), strict=True):
        alone = quantize_tensor(part, name, fit="absmax")
        assert all(torch.equal(found.fields[f], alone.fields[f]) for f in alone.fields)


def test_what_does_not_stack() -> None:
    """One scale for the whole weight; tiles that two weights would share."""
    assert rows_stack(get_format("int4-g64"), [(5, 64), (7, 64)])
    assert not rows_stack(get_format("int8-tensor"), [(5, 64), (7, 64)])
    assert rows_stack(get_format("trellis-2"), [(64, 64), (63, 64)])
    assert not rows_stack(get_format("trellis-2"), [(63, 64), (64, 64)])
    assert not rows_stack(get_format("trellis-2"), [(40, 64), (60, 64)])
