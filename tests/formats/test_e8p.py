"""E8P: the codebook, exact search, the layout, error feedback over blocks of eight."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from bitfold.errors import FormatError, WeightError
from bitfold.formats import get_format, read_description
from bitfold.formats.families.e8p import E8P, magnitudes, nearest_codes, points
from bitfold.methods.gptq import proxy_loss
from bitfold.methods.quantize import quantize_tensor
from bitfold.qtensor import QTensor

FORMAT = E8P["e8p"]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    """Seeded normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_codebook_is_a_piece_of_e8() -> None:
    """2**16 different points, all in E8 + 1/4: differences of two points are lattice vectors."""
    assert len(torch.unique(points(), dim=0)) == 1 << 16
    quarters = points().long()
    differences = quarters[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))] - quarters
    assert not (differences % 2).any()
    halves = differences // 2  # twice the lattice vector: all even (D8) or all odd (D8 + 1/2), with an even sum
    assert ((halves % 2).sum(1) % 8 == 0).all()
    assert (halves.sum(1) % 4 == 0).all()


def test_every_code_decodes_to_its_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """Natively and in PyTorch; rows whose last block is cut off leave their neighbours alone."""
    code = torch.arange(1 << 16)
    packed = torch.stack([code & 255, code >> 8], -1).to(torch.uint8).view(64, -1)
    whole = QTensor(FORMAT, (64, 8192), {"codes": packed, "scale": torch.full((64, 1), 0.5).bfloat16()})
    cut = QTensor(FORMAT, (64, 8187), whole.fields)
    decoded = whole.dequantize(), cut.dequantize()
    assert torch.equal(decoded[0].view(-1, 8), points() / 2)
    assert torch.equal(decoded[1], decoded[0][:, :8187])
    monkeypatch.setattr("bitfold.system.native.core", lambda: None)
    assert torch.equal(whole.dequantize(), decoded[0])
    assert torch.equal(cut.dequantize(), decoded[1])


def test_magnitudes() -> None:
    """227 vectors of norm**2 at most 10, all there are, and 29 of norm**2 12; the first and the last of the order."""
    norms = magnitudes().square().sum(1)
    assert (norms <= 10).sum() == 227
    assert (norms == 12).sum() == 29
    assert norms.equal(norms.sort().values)
    assert magnitudes()[0].tolist() == [0.5] * 8
    threes = sum(1 for t in range(5) for _ in combinations(range(8), t))
    assert threes + 8 + 8 * 7 == 227  # up to four 3/2; one 5/2; one 5/2 and one 3/2


def test_codes_by_hand() -> None:
    """Code 0; the sign of the first entry drags the last one along; the move; the padding's parity is odd."""
    assert points()[0].tolist() == [3] * 8
    assert points()[1 << 8].tolist() == [-1, 3, 3, 3, 3, 3, 3, -1]
    assert points()[1 << 15].tolist() == [1] * 8
    assert magnitudes()[1].tolist() == [0.5] * 7 + [1.5]
    assert points()[1].tolist() == [3] * 7 + [-5]


@pytest.mark.parametrize("spread", [0.3, 1.0, 1.6, 6.0])
def test_the_search_is_exact(spread: float) -> None:
    """Against all 2**16 points in float64: well inside the codebook, at its edge and far outside."""
    x = gaussian(400, 8, seed=int(10 * spread)) * spread
    every = points().double() / 4
    found = (every[nearest_codes(x.T.contiguous()).long()] - x).square().sum(1)
    least = torch.cat([(every - row).square().sum(1).amin(keepdim=True) for row in x.double()])
    assert (found <= least * (1 + 1e-6) + 1e-9).all()


def test_points_are_their_own_nearest() -> None:
    """encode(decode(c)) == c for all 2**16 codes."""
    exact = points().float().T.contiguous() / 4
    assert torch.equal(nearest_codes(exact), torch.arange(1 << 16, dtype=torch.int32))


def test_gaussian_error() -> None:
    """Two-sided. The literature states .089 (QTIP, table 1); with one scale a row, exact search gives .0914."""
    w = gaussian(256, 2048)
    error = (quantize_tensor(w, "e8p").dequantize() - w).square().mean().item()
    assert 0.0905 < error < 0.0923
    scalar = (quantize_tensor(w, "int2-tensor", fit="mse").dequantize() - w).square().mean().item()
    assert error < 0.62 * scalar


@pytest.mark.parametrize("shape", [(5, 64), (3, 203), (4, 5), (1, 1)], ids=str)
def test_layout_and_rows(shape: tuple[int, int]) -> None:
    """Bytes are what the layout says; rows are rows; scales follow powers of two."""
    w = gaussian(*shape)
    q = quantize_tensor(w, "e8p")
    assert q.nbytes == shape[0] * (2 * -(-shape[1] // 8) + 2)
    index = torch.tensor([shape[0] - 1, 0])
    assert torch.equal(q.rows(index), q.dequantize()[index])
    assert torch.equal(quantize_tensor(w / 64, "e8p").dequantize() * 64, q.dequantize())
    again = FORMAT.encode(q.dequantize(), None)
    assert set(again) == set(q.fields)


def test_codes_are_little_endian() -> None:
    """The bytes of a code, low one first, and the value that they mean."""
    fields = {
        "codes": torch.tensor([[0x01, 0x81]], dtype=torch.uint8),
        "scale": torch.tensor([[0.5]], dtype=torch.bfloat16),
    }
    decoded = QTensor(FORMAT, (1, 8), fields).dequantize()
    assert torch.equal(decoded, points()[0x8101].float()[None] / 2)
    assert decoded[0].tolist() == [-1.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 2.5]


def test_stacks_and_zeros() -> None:
    """Experts one by one; a row of zeros stays zero, since its scale is zero."""
    w = gaussian(3, 4, 24)
    w[1, 2] = 0
    q = quantize_tensor(w, "e8p")
    assert torch.equal(q.expert(1).dequantize(), quantize_tensor(w[1], "e8p").dequantize())
    assert not q.dequantize()[1, 2].any()


def test_feedback_beats_rounding() -> None:
    """Blocks of eight coded jointly, the error of each fed to the next."""
    mix = gaussian(192, 192, seed=1) * torch.linspace(2, 0.1, 192)
    x = gaussian(768, 192, seed=2) @ mix
    w, hessian = gaussian(32, 192), x.T @ x / len(x)
    fed, rounded = (
        proxy_loss(w, quantize_tensor(w, "e8p", method=s, hessian=hessian).dequantize(), hessian)
        for s in ("ldlq", "rtn")
    )
    assert fed < 0.67 * rounded


def test_bad_input() -> None:
    """NaN among the weights, scales of another number of rows, a description of another block."""
    with pytest.raises(WeightError, match="NaN"):
        FORMAT.coder(torch.zeros(2, 8), None).encode(torch.full((2, 8), float("nan")), 0)
    with pytest.raises(FormatError, match="not known here"):
        read_description("e8p-x", {**get_format("e8p").describe(), "block": 16})
