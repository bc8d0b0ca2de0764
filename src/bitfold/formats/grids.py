"""Grids: what a code means.

A grid is a short table of real numbers; a code is an index into it. Integers, minifloats (OCP FP8/FP4, E8M0),
NormalFloat and ternary are all the same thing here. Rounding is to the nearest point, ties as IEEE 754 does it (to the
even code), or upwards for grids that hold scales (a scale rounded down would clip the largest weight).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise

import torch

from bitfold.errors import FormatError
from bitfold.formats import packing

_MOST_CELLS = 256


@dataclass(frozen=True)
class _Cells:
    """Cells of equal width with at most one boundary each: nearest points by look-up, several times as fast as search.

    The cell of a number never decreases with the number, whatever the rounding on the way, so that a number in a cell
    before (behind) that of a boundary lies before (behind) the boundary: only the one boundary within its own cell is
    compared. Exact, therefore.

    Args:
        scale, shift: x falls into the cell x * scale + shift, rounded down, at least 0 and at most the last.
        boundary: float32 (cells,), the boundary within each cell, or infinity.
        points: float32 (2 * cells,), the nearest points below and above the boundary of each cell.
        codes: uint8 (2 * cells,), their codes.
    """

    scale: float
    shift: float
    boundary: torch.Tensor
    points: torch.Tensor
    codes: torch.Tensor

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """uint8 codes of the nearest points."""
        return self.codes.to(x.device).index_select(0, self._side(x.reshape(-1))).view(x.shape)

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """float32 nearest points."""
        return self.points.to(x.device).index_select(0, self._side(x.reshape(-1))).view(x.shape)

    def _side(self, x: torch.Tensor) -> torch.Tensor:
        cell = _cell_of(x, self.scale, self.shift, len(self.boundary))
        above = x > self.boundary.to(x.device).index_select(0, cell)
        return cell.mul_(2).add_(above)


def _cell_of(x: torch.Tensor, scale: float, shift: float, count: int) -> torch.Tensor:
    # NaN survives the first clamp and becomes whatever an integer makes of it.
    return (x * scale).add_(shift).clamp_(0, count - 1).to(torch.int32).clamp_(0, count - 1)


def _cells(boundaries: torch.Tensor, values: torch.Tensor, codes: torch.Tensor) -> _Cells | None:
    """The fewest cells that part all boundaries, or None."""
    first, last = float(boundaries[0]), float(boundaries[-1])
    count = 8
    while count <= _MOST_CELLS and len(boundaries) > 1:
        scale = (count - 1) / (last - first)
        where = _cell_of(boundaries, scale, -first * scale, count).long()
        if len(torch.unique(where)) == len(boundaries):
            below = torch.searchsorted(where, torch.arange(count))
            boundary = torch.full((count,), torch.inf)
            boundary[where] = boundaries
            sides = torch.stack([below, below + torch.isfinite(boundary)], 1).flatten()
            return _Cells(scale, -first * scale, boundary, values[sides], codes[sides])
        count *= 2
    return None


@dataclass(frozen=True)
class Grid:
    """A table of representable numbers.

    Args:
        name: short name, used in format names and in stored descriptions.
        points: value of each code; NaN marks a code that is never produced (NaN and infinity of FP8).
        round: "nearest" (ties to the even code) or "up" (towards +infinity, for scales).
    """

    name: str
    points: tuple[float, ...]
    round: str = "nearest"

    @property
    def levels(self) -> int:
        """Number of different finite values."""
        return len(self._order[1])

    @property
    def trits(self) -> bool:
        """Three levels are packed five to a byte instead of in 2 bits."""
        return len(self.points) == 3

    @property
    def bits(self) -> Fraction:
        """Stored bits of one code."""
        return Fraction(8, 5) if self.trits else Fraction(self.code_bits)

    @property
    def code_bits(self) -> int:
        """Whole bits needed to hold one code unpacked from its neighbours."""
        return max(1, (len(self.points) - 1).bit_length())

    @property
    def span(self) -> tuple[float, float]:
        """Smallest and largest finite value."""
        values = self._order[0]
        return values[0], values[-1]

    @cached_property
    def _order(self) -> tuple[list[float], list[int]]:
        # Both zeros of a minifloat mean the same number: keep the first code (+0), so that codes are canonical.
        first: dict[float, int] = {}
        for code, value in enumerate(self.points):
            if math.isfinite(value) and value not in first:
                first[value] = code
        values = sorted(first)
        return values, [first[v] for v in values]

    @cached_property
    def uniform(self) -> bool:
        """Codes 0, 1, 2 ... name consecutive integers: rounding is arithmetic and needs no search."""
        steps = {b - a for a, b in pairwise(self.points)}
        return steps == {1.0} and self.round == "nearest"

    @cached_property
    def _boundaries(self) -> torch.Tensor:
        values, codes = self._order
        if self.round == "up":
            # A hair of slack, or an exactly representable scale would move up after one rounding in its computation.
            return torch.tensor(values[:-1], dtype=torch.float32) * (1 + 2**-18)
        mids = torch.tensor([(a + b) / 2 for a, b in pairwise(values)], dtype=torch.float32)
        # `bucketize` sends x == boundary down; where the upper code is the even one, move the boundary just below.
        upper_even = torch.tensor([c % 2 == 0 for c in codes[1:]])
        return torch.where(upper_even, torch.nextafter(mids, torch.tensor(-math.inf)), mids)

    @cached_property
    def _cells(self) -> _Cells | None:
        """Look-up of ranks; None for grids whose boundaries crowd, such as FP8's around zero."""
        return _cells(self._boundaries, torch.tensor(self._order[0]), torch.tensor(self._order[1], dtype=torch.uint8))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """uint8 codes of the nearest points; x is float32 of any shape, values outside the span saturate."""
        if self.uniform:
            low = self.points[0]
            return (x.round() - low).clamp_(0, len(self.points) - 1).to(torch.uint8)
        if self._cells is not None:
            return self._cells.encode(x)
        index = torch.bucketize(x, self._boundaries.to(x.device), out_int32=True)
        return torch.tensor(self._order[1], dtype=torch.uint8).to(x.device)[index]

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """float32 values of uint8 codes of any shape."""
        if self.uniform:
            return codes.to(torch.float32).add_(self.points[0])
        return torch.tensor(self.points, dtype=torch.float32).to(codes.device)[codes.int()]

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """The value that `decode(encode(x))` gives; may overwrite x, which fits try thousands of times."""
        if self.uniform:
            return x.round_().clamp_(*self.span)
        if self._cells is not None:
            return self._cells.nearest(x)
        return self.decode(self.encode(x))

    def packed_bytes(self, length: int) -> int:
        """Bytes of one row of `length` codes."""
        return math.ceil(length / 5) if self.trits else math.ceil(length * self.code_bits / 8)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """uint8 codes (..., length) -> bytes (..., packed_bytes(length))."""
        return packing.pack_trits(codes) if self.trits else packing.pack(codes, self.code_bits)

    def unpack(self, packed: torch.Tensor, length: int) -> torch.Tensor:
        """Inverse of `pack`."""
        return packing.unpack_trits(packed, length) if self.trits else packing.unpack(packed, self.code_bits, length)

    def take(self, packed: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Codes of some columns of packed rows: unpack(packed, length)[:, index]."""
        return packing.take_trits(packed, index) if self.trits else packing.take(packed, self.code_bits, index)


def ints(bits: int) -> Grid:
    """Signed integers -2**(bits-1) ... 2**(bits-1)-1 in offset binary; one bit is {-1, +1}."""
    if bits == 1:
        return Grid("int1", (-1.0, 1.0))
    half = 2 ** (bits - 1)
    return Grid(f"int{bits}", tuple(float(v) for v in range(-half, half)))


def uints(bits: int) -> Grid:
    """Unsigned integers 0 ... 2**bits-1."""
    return Grid(f"uint{bits}", tuple(float(v) for v in range(2**bits)))


def minifloat(name: str, exponent: int, mantissa: int, special: Callable[[int], bool]) -> Grid:
    """Sign, exponent, mantissa bits with subnormals and bias 2**(exponent-1)-1.

    `special(code without sign)` names the codes that are infinity or NaN in that encoding (OCP FP8 specification 1.0,
    OCP microscaling specification 1.0).
    """
    bias = 2 ** (exponent - 1) - 1

    def value(code: int) -> float:
        body = code & (2 ** (exponent + mantissa) - 1)
        if special(body):
            return math.nan
        field, fraction = body >> mantissa, body & (2**mantissa - 1)
        significand = fraction / 2**mantissa + (field > 0)
        return math.copysign(significand * 2.0 ** (max(field, 1) - bias), -1.0 if code != body else 1.0)

    return Grid(name, tuple(value(code) for code in range(2 ** (1 + exponent + mantissa))))


E2M1 = minifloat("e2m1", 2, 1, lambda body: False)
E4M3 = minifloat("e4m3", 4, 3, lambda body: body == 0x7F)
E5M2 = minifloat("e5m2", 5, 2, lambda body: body >= 0x7C)
E8M0 = Grid("e8m0", (*(2.0 ** (e - 127) for e in range(255)), math.nan), round="up")
# Positive magnitudes for scales of scales: rounding up keeps the largest weight inside the span.
U8_SCALE = Grid("u8-scale", tuple(float(v) for v in range(256)), round="up")
TERNARY = Grid("ternary", (-1.0, 0.0, 1.0))
# QLoRA (Dettmers et al. 2023), appendix E: the 16 levels of NormalFloat-4.
NF4 = Grid(
    "nf4",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)

GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        *(ints(b) for b in range(1, 9)),
        *(uints(b) for b in range(1, 9)),
        E2M1,
        E4M3,
        E5M2,
        E8M0,
        U8_SCALE,
        TERNARY,
        NF4,
    )
}


def get_grid(name: str) -> Grid:
    """The grid of that name; FormatError if there is none."""
    if name not in GRIDS:
        raise FormatError(f"unknown grid {name!r}", hint=f"known grids: {', '.join(GRIDS)}")
    return GRIDS[name]
