"""Tiles of a trellis code: 128 weights to bytes and back.

The search is Viterbi's over a circular stream, in integers, so that the native core (threads, vectors of any width)
and the PyTorch path here give the same bytes. The format is specified in docs/trellis.md.

Costs of a step: with x and the table in 1/16 step, d = |x - level| capped at 0xffff >> gain, cost =
((d << gain)**2 >> 16) less the smallest one of the step. Sums saturate at 0xffff and are lowered to a minimum of zero
before every 16th step. Ties go to the lowest predecessor.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitfold.errors import FormatError
from bitfold.system import backend, native

TILE = 128  # weights in a tile
TILE_ROWS, TILE_COLS = 32, 4
_SUBSTEPS = 16
_CLAMP = 200.0  # steps; weights beyond are encoded as if they were there
_FULL = 0xFFFF
_INDIFFERENT = -30000  # so far from every level that all cost the same


class _Limits(NamedTuple):
    """What decoders count on: two bytes hold a window, few registers a table. `gain` sets the resolution of costs."""

    window: int
    index_bits: int
    gain: int


_LIMITS = {1: _Limits(16, 6, 3), 2: _Limits(16, 6, 4), 3: _Limits(14, 7, 5), 4: _Limits(16, 8, 5)}


@dataclass(frozen=True)
class TrellisCode:
    """A sliding-window code: the window of L bits that begins with a weight's own k bits names a table entry.

    Args:
        bits: k, bits of a weight, 1..4.
        columns: one table index for each of the L bits of the window, the lowest first; those of the set bits are
            combined by exclusive or.
        table: 2**w values in -127..127, odd: entry ~i is minus entry i. A weight is its row's scale times one of them.
        sigma: the scale of a row of normally distributed weights is its standard deviation / sigma.

    Raises:
        FormatError: numbers that are out of range or do not fit together.
    """

    bits: int
    columns: tuple[int, ...]
    table: tuple[int, ...]
    sigma: float

    def __post_init__(self) -> None:
        size = len(self.table)
        if self.bits not in _LIMITS or not 9 <= self.window <= _LIMITS[self.bits].window:
            raise FormatError(f"a trellis of {self.bits} bits with windows of {self.window} bits is not known")
        if size not in (2**w for w in range(self.bits, _LIMITS[self.bits].index_bits + 1)):
            raise FormatError(f"a trellis of {self.bits} bits has no table of {size} entries")
        if not all(0 <= c < size for c in self.columns) or not 0 < self.sigma < 1e4:
            raise FormatError("trellis columns must be indices of the table, and sigma positive")
        if any(a != -b or abs(a) > 127 for a, b in zip(self.table, reversed(self.table), strict=True)):
            raise FormatError("a trellis table must be odd (entry ~i is minus entry i) and within -127..127")

    @property
    def window(self) -> int:
        """L, bits of a window."""
        return len(self.columns)

    @property
    def index_bits(self) -> int:
        """w: the table has 2**w entries."""
        return len(self.table).bit_length() - 1

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile of 128 weights."""
        return TILE * self.bits // 8

    @property
    def matrices(self) -> tuple[int, int]:
        """The hash of the low and of the high byte of a window as 8x8 bit matrices: operands of GF2P8AFFINEQB.

        Bit i of the index is the parity of byte 7 - i of the matrix and the byte of the window.
        """
        return _matrix(self.columns[:8]), _matrix(self.columns[8:])


def _matrix(columns: tuple[int, ...]) -> int:
    rows = [sum((c >> i & 1) << j for j, c in enumerate(columns)) for i in range(8)]
    return sum(row << 8 * (7 - i) for i, row in enumerate(rows))


@functools.cache
def positions(bits: int) -> Tensor:
    """int64 (128): where in the tile (32 rows x 4 columns, row by row) each weight of the stream sits."""
    turn = 2 if bits == 3 else 8 // bits
    t = torch.arange(TILE)
    return t // turn % 2 * 64 + t // (2 * turn) * turn + t % turn


@backend.constant
def _windows(code: TrellisCode, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 (128): at which bit the window of each place of the tile begins; the table value of every window."""
    return _starts(code.bits, device), window_values(code, device)


@functools.cache
def _starts(bits: int, device: torch.device) -> Tensor:
    return (torch.argsort(positions(bits)) * bits).to(device)


@functools.cache
def window_values(code: TrellisCode, device: torch.device = backend.CPU) -> Tensor:
    """int8 (2**L): the table value of every window."""
    return torch.tensor(code.table, dtype=torch.int8).to(device)[_indices(code, device)]


@functools.cache
def _indices(code: TrellisCode, device: torch.device = backend.CPU) -> Tensor:
    index = torch.zeros(1, dtype=torch.int64)
    for column in code.columns:
        index = torch.cat([index, index ^ column])
    return index.to(device)


@functools.cache
def native_code(code: TrellisCode) -> Any:
    """The code as the native core takes it, which must be there."""
    core = native.core()
    assert core is not None
    return core.TrellisCode(bits=code.bits, gain=_LIMITS[code.bits].gain, columns=code.columns, table=code.table)


def encode_tiles(code: TrellisCode, x: Tensor, *, thorough: bool = False) -> tuple[Tensor, Tensor]:
    """The bytes whose table values come closest to x, tile by tile, and those values.

    Args:
        code: the trellis code.
        x: float (tiles, 128): weights divided by the scale of their row, each tile as 32 rows of 4 columns; NaN where
            any value will do, such as beyond the edge of a matrix.
        thorough: go round the tile twice before the circle is closed: half as long again, about 0.7 % less error.

    Returns:
        uint8 (tiles, 16 k) and int8 (tiles, 128). The same whatever the number of threads and the instruction set.

    Raises:
        FormatError: x has another shape, or is infinite somewhere.
    """
    if x.dim() != 2 or x.shape[1] != TILE:
        raise FormatError(f"tiles to encode must be (tiles, {TILE}), not {tuple(x.shape)}")
    if torch.isinf(x).any():
        raise FormatError("an infinite weight in a trellis tile")
    x = x.detach().float().contiguous()
    tiles = torch.empty(len(x), code.tile_bytes, dtype=torch.uint8, device=x.device)
    values = torch.empty(len(x), TILE, dtype=torch.int8, device=x.device)
    core = backend.core_for(x)
    if core is None:
        step = 16 if x.device.type == "cpu" else max(1, backend.scratch(x.device) // _search_bytes(code))
        for first in range(0, len(x), step):
            part = slice(first, first + step)
            tiles[part], values[part] = _torch_encode(code, x[part], thorough)
    else:
        pointers = (x.data_ptr(), len(x), tiles.data_ptr(), values.data_ptr())
        if not core.trellis_encode(native_code(code), *pointers, thorough, native.threads()):
            raise MemoryError("the trellis encoder could not allocate its tables")
    return tiles, values


def decode_tiles(code: TrellisCode, tiles: Tensor) -> Tensor:
    """int8 (tiles, 128) table values, each tile as 32 rows of 4 columns, of uint8 (tiles, 16 k).

    Raises:
        FormatError: other dtype or shape.
    """
    if tiles.dtype != torch.uint8 or tiles.dim() != 2 or tiles.shape[1] != code.tile_bytes:
        raise FormatError(
            f"trellis tiles must be uint8 (tiles, {code.tile_bytes}), not {tiles.dtype} {tuple(tiles.shape)}"
        )
    core = None if backend.at_once(tiles) else backend.core_for(tiles)
    if core is None:
        return _torch_decode(code, tiles)
    tiles = tiles.contiguous()
    values = torch.empty(len(tiles), TILE, dtype=torch.int8)
    core.trellis_decode(native_code(code), tiles.data_ptr(), len(tiles), values.data_ptr(), native.threads())
    return values


def _torch_decode(code: TrellisCode, tiles: Tensor) -> Tensor:
    """Each place of a tile looks up its window, by PyTorch's operations alone: what accelerators run."""
    bit, table = _windows(code, tiles.device)
    byte = bit // 8
    circle = torch.cat([tiles, tiles[:, :2]], 1).int()
    word = circle[:, byte] | circle[:, byte + 1] << 8 | circle[:, (byte + 2) % circle.shape[1]] << 16
    windows = word >> (bit % 8) & (1 << code.window) - 1
    return table[windows]


def _search_bytes(code: TrellisCode) -> int:
    """Memory that the search takes for one tile: what each state came from, at each step, and a few costs of each."""
    states = 1 << code.window
    return 2 * TILE * (states >> code.bits) + 32 * states


def _torch_encode(code: TrellisCode, x: Tensor, thorough: bool) -> tuple[Tensor, Tensor]:
    """The native search in PyTorch: the windows of all weights run from the last of the stream to the first."""
    rounded = (x.clamp(-_CLAMP, _CLAMP) * _SUBSTEPS).round()
    order = positions(code.bits).to(x.device)
    fixed = rounded.nan_to_num(_INDIFFERENT).int()[:, order].flip(1)
    reach = TILE if thorough else TILE // 2
    seam_path = _search(code, torch.cat([fixed[:, TILE - reach :], fixed[:, :reach]], 1), None)
    seam = seam_path[:, reach - 1] & (1 << code.window - code.bits) - 1
    path = _search(code, fixed, seam).flip(1)
    symbols = path & (1 << code.bits) - 1
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    values[:, order] = window_values(code, x.device)[path]
    return _pack(symbols, code.bits), values


def _pack(symbols: Tensor, bits: int) -> Tensor:
    """uint8 (tiles, 16 k) of symbols (tiles, 128), the first one in the lowest bits."""
    eight = torch.arange(8, device=symbols.device)
    ones = symbols[..., None] >> eight[:bits] & 1
    return (ones.view(len(symbols), -1, 8) << eight).sum(-1).to(torch.uint8)


def _search(code: TrellisCode, x: Tensor, seam: Tensor | None) -> Tensor:
    """Windows (tiles, steps) of the cheapest path for x (tiles, steps); with a seam, of the cheapest circle."""
    k, low = code.bits, 1 << code.window - code.bits
    index, back, device = _indices(code, x.device), [], x.device
    cost = torch.zeros(len(x), 1 << code.window, dtype=torch.int32, device=device)
    if seam is not None:
        cost = torch.where(torch.arange(1 << code.window, device=device) % low == seam[:, None], 0, _FULL).int()
    choice = torch.arange(1 << k, dtype=torch.int32, device=device)[:, None]
    for t in range(x.shape[1]):
        base = cost.amin(1, keepdim=True) if t and t % 16 == 0 else 0
        best = (cost.view(-1, 1 << k, low) << k | choice).amin(1)
        back.append((best & (1 << k) - 1).to(torch.uint8))
        least = ((best >> k) - base)[..., None].expand(-1, -1, 1 << k).flatten(1)
        cost = (least + _metric(code, x[:, t])[:, index]).clamp_max_(_FULL)
    return _trace(code, back, _last(cost, seam, low))


def _metric(code: TrellisCode, x: Tensor) -> Tensor:
    """int32 (tiles, 2**w): cost of each table value for one weight of every tile."""
    gain = _LIMITS[code.bits].gain
    levels = torch.tensor(code.table, dtype=torch.int32).to(x.device) * _SUBSTEPS
    near = (x[:, None] - levels).abs().clamp_max_(_FULL >> gain).long() << gain
    cost = (near * near >> 16).int()
    return cost - cost.amin(1, keepdim=True)


def _last(cost: Tensor, seam: Tensor | None, low: int) -> Tensor:
    if seam is None:
        return (cost.long() << 16 | torch.arange(cost.shape[1], device=cost.device)).amin(1) & 0xFFFF
    closing = torch.arange(cost.shape[1] // low, device=cost.device) * low + seam[:, None]
    return (cost.gather(1, closing).long() << 16 | closing).amin(1) & 0xFFFF


def _trace(code: TrellisCode, back: list[Tensor], last: Tensor) -> Tensor:
    path = [last]
    for choices in reversed(back[1:]):
        before = path[-1] >> code.bits
        path.append(choices.gather(1, before[:, None]).long()[:, 0] << code.window - code.bits | before)
    return torch.stack(path[::-1], 1)
