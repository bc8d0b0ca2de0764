"""Additive codebooks: search, training, the layout, refinement under the Hessian."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from bitfold.errors import FormatError, WeightError
from bitfold.formats import FORMATS, get_format, read_description
from bitfold.formats.families.aqlm import Additive
from bitfold.formats.families.codebooks import beam_search, least_squares, train_books, values_of
from bitfold.methods.aqlm import _Work
from bitfold.methods.gptq import proxy_loss
from bitfold.methods.quantize import quantize_tensor
from bitfold.qtensor import QTensor

SMALL = Additive("aqlm-2x5", 2, 5)  # fast, and its codes do not fill bytes


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    """Seeded normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(n: int = 40, k: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of correlated inputs."""
    x = gaussian(4 * k, k, seed=1) @ (gaussian(k, k, seed=2) * torch.linspace(2, 0.1, k))
    return gaussian(n, k), x.T @ x / len(x)


def loss(x: torch.Tensor, books: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Squared error of each vector, in float64."""
    return (x.double() - values_of(books.double(), codes)).square().sum(1)


@pytest.mark.parametrize("books", [1, 2, 3])
@pytest.mark.parametrize("given", [False, True], ids=["fresh", "improving"])
def test_beam_search_is_never_worse_than_greedy(books: int, given: bool) -> None:
    """Vector by vector; nor than where it begins; and wider beams gain something on the whole."""
    x, entries = gaussian(300, 8), gaussian(books, 16, 8, seed=1)
    start = torch.randint(16, (300, books), generator=torch.Generator().manual_seed(2)) if given else None
    greedy, wide = (loss(x, entries, beam_search(x, entries, start, beam=b)) for b in (1, 6))
    assert (wide <= greedy * (1 + 1e-5)).all()
    assert books == 1 or wide.sum() < 0.995 * greedy.sum()
    if start is not None:
        assert (greedy <= loss(x, entries, start) * (1 + 1e-5)).all()


def test_one_book_is_searched_exactly() -> None:
    """And two books by a beam that keeps everything."""
    x, entries = gaussian(200, 8), gaussian(2, 8, 8, seed=1)
    one = loss(x, entries[:1], beam_search(x, entries[:1]))
    assert torch.allclose(one, torch.cdist(x.double(), entries[0].double()).square().amin(1))
    sums = (entries[0][:, None] + entries[1]).view(-1, 8)
    two = loss(x, entries, beam_search(x, entries, beam=8))
    assert torch.allclose(two, torch.cdist(x.double(), sums.double()).square().amin(1), rtol=1e-4)


def test_planted_books_are_found() -> None:
    """Vectors that are sums of entries: least squares finds the entries from the codes."""
    books = gaussian(2, 16, 8)
    codes = torch.randint(16, (2000, 2), generator=torch.Generator().manual_seed(1))
    x = values_of(books, codes)
    found = least_squares(x, codes, books + 0.3 * gaussian(2, 16, 8, seed=2))
    assert loss(x, found, codes).mean() < 1e-4
    trained = train_books(x, 1, 256, 0)  # as many entries as sums: most of them are found, and few are mixed up
    assert (loss(x, trained, beam_search(x, trained)) < 1e-6).double().mean() > 0.6


# Two-sided: of the literature 2-D to 8-D codes at 2 bits lie between .0936 (random) and .0625 (the bound); trained
# additive ones, on few vectors, overfit a little.
@pytest.mark.parametrize(("name", "low", "high"), [("aqlm-1x8", 0.27, 0.32), ("aqlm-2x8", 0.074, 0.090)])
def test_gaussian_error(name: str, low: float, high: float) -> None:
    w = gaussian(64, 1024)
    assert low < (quantize_tensor(w, name).dequantize() - w).square().mean().item() < high


@pytest.mark.parametrize("shape", [(6, 64), (5, 203), (3, 5)], ids=str)
@pytest.mark.parametrize("format", [SMALL, FORMATS["aqlm-1x8"]], ids=lambda f: f.name)
def test_layout_and_rows(format: Additive, shape: tuple[int, int]) -> None:
    """Bytes counted with the books; rows are rows; scales follow powers of two."""
    w = gaussian(*shape)
    q = quantize_tensor(w, format)
    groups = -(-shape[1] // 8)
    codes = shape[0] * -(-groups * format.books * format.code_bits // 8)
    assert q.nbytes == codes + format.books * 2**format.code_bits * 16 + 2 * shape[0]
    index = torch.tensor([shape[0] - 1, 0, 1])
    assert torch.equal(q.rows(index), q.dequantize()[index])
    found, small = q.dequantize(), quantize_tensor(w / 64, format).dequantize() * 64
    errors = [float((w - d).square().mean()) for d in (found, small)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3, abs=1e-9)


def test_decoding_by_hand() -> None:
    """Two books of four entries: codes of 2 bits, the first book's in the lowest bits."""
    books = torch.arange(64, dtype=torch.float16).view(2, 4, 8)
    codes = torch.tensor([[0b0110, 0b1011]], dtype=torch.uint8)  # (2, 1) for the first eight columns, (3, 2)
    fields = {"codes": codes[:, :1] | codes[:, 1:] << 4, "codebooks": books, "scale": torch.tensor([[2.0]]).bfloat16()}
    decoded = QTensor(Additive("aqlm-2x2", 2, 2), (1, 12), fields).dequantize()
    expected = 2 * torch.cat([books[0, 2] + books[1, 1], (books[0, 3] + books[1, 2])[:4]])
    assert torch.equal(decoded[0], expected.float())


def test_each_step_lowers_the_loss() -> None:
    """Books, scales and codes in turn, the damped loss measured after each; rows one by one for the codes."""
    w, hessian = problem()
    work = _Work(w, hessian, quantize_tensor(w, SMALL, method="ldlq", hessian=hessian), 0.01)
    losses = [work.loss()]
    for _ in range(2):
        for step in (work.refit_books, work.refit_scales, lambda: work.search(4)):
            step()
            losses.append(work.loss())
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]
    assert abs(losses[-1] - float(_Work(w, hessian, work.finish(), 0.01).loss())) < 1e-4 * losses[-1]


def test_refinement_beats_feedback_beats_rounding() -> None:
    """Under correlated inputs."""
    w, hessian = problem()
    rounded, fed, refined = (
        proxy_loss(w, quantize_tensor(w, SMALL, method=s, hessian=hessian).dequantize(), hessian)
        for s in ("rtn", "ldlq", "aqlm")
    )
    assert refined < 0.9 * fed
    assert fed < 0.75 * rounded


@pytest.mark.parametrize("k", [5, 93, 130])
def test_odd_widths_and_dead_inputs(k: int) -> None:
    """Rows that are no whole groups; inputs that are always zero; a row of zeros; a singular Hessian."""
    w, hessian = problem(24, k)
    hessian[3], hessian[:, 3] = 0, 0
    w[7] = 0
    q = quantize_tensor(w, SMALL, method="aqlm", hessian=hessian)
    assert torch.isfinite(q.dequantize()).all()
    assert not q.dequantize()[7].any()
    assert proxy_loss(w, q.dequantize(), hessian) < 0.3
    assert torch.isfinite(quantize_tensor(w, SMALL, method="aqlm", hessian=torch.ones(k, k)).dequantize()).all()


def test_same_bytes_twice() -> None:
    """Nothing is drawn from the global generator."""
    w, hessian = problem()
    torch.manual_seed(1)
    first = quantize_tensor(w, SMALL, method="aqlm", hessian=hessian)
    torch.manual_seed(2)
    second = quantize_tensor(w, SMALL, method="aqlm", hessian=hessian)
    assert all(torch.equal(first.fields[f], second.fields[f]) for f in first.fields)


def test_names_and_descriptions() -> None:
    """Other sizes by name; what is refused."""
    assert get_format("aqlm-3x6").bpw == Fraction(18, 8)
    assert read_description("aqlm-3x6", get_format("aqlm-3x6").describe()) == get_format("aqlm-3x6")
    for bad in ("aqlm-0x8", "aqlm-2x16", "aqlm-2"):
        with pytest.raises(FormatError, match="unknown format"):
            get_format(bad)
    for change in ({"books": 0}, {"block": 16}, {"bits": "x"}):
        with pytest.raises(FormatError):
            read_description("aqlm-x", {**SMALL.describe(), **change})
    with pytest.raises(FormatError, match="no codebooks"):
        quantize_tensor(gaussian(4, 8), "int4", method="aqlm", hessian=torch.eye(8))
    with pytest.raises(WeightError, match="NaN"):
        SMALL.coder(torch.full((2, 8), float("nan")), None)
    assert quantize_tensor(gaussian(4, 16), SMALL, method="aqlm").shape == (4, 16)
