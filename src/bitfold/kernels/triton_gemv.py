"""Fused decoding and products of a few rows, in Triton. Imported only where Triton is, see fused.py.

A program takes some rows of the weight and a share of its columns; codes are decoded in registers as the formats say,
multiplied in float32 and forgotten. Shares are added up by PyTorch, in an order of its own on each device, but always
the same one.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16  # of a weight of codes, for each program; of a trellis they are a tile's 32
_COLUMNS = 64  # at a time
_PROGRAMS = 512  # or so keep a device busy
# Pointers and numbers: the compiler of kernels looks annotations up, and takes none but its own.
_In: TypeAlias = tl.tensor


@triton.jit
def _dense(
    x: _In, codes: _In, scale: _In, zero: _In, points: _In, out: _In, n: _In, k: _In, m: _In, row_bytes: _In,
    scale_row: _In, group: _In, first_point: _In, share: _In, BITS: tl.constexpr, TABLE: tl.constexpr,
    ZERO: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """out[share] (m, n) = x (m, k) times (point[code] - zero) * scale of a range of columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    one = tl.arange(0, M)
    real = row < n
    begin = tl.program_id(1) * share
    total = tl.zeros((M, ROWS), dtype=tl.float32)
    for at in range(begin, tl.minimum(begin + share, k), COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        inside = real[:, None] & (column < k)[None, :]
        bit = column * BITS
        place = row.to(tl.int64)[:, None] * row_bytes + (bit // 8)[None, :]
        word = tl.load(codes + place, mask=inside, other=0).to(tl.int32)
        if 8 % BITS != 0:  # a code may run on into the next byte
            more = inside & (bit // 8 + 1 < row_bytes)[None, :]
            word = word | (tl.load(codes + place + 1, mask=more, other=0).to(tl.int32) << 8)
        code = (word >> (bit % 8)[None, :]) & ((1 << BITS) - 1)
        if TABLE:
            value = tl.load(points + code)
        else:
            value = code.to(tl.float32) + first_point
        where = row.to(tl.int64)[:, None] * scale_row + (column // group)[None, :]
        if ZERO:
            value = value - tl.load(zero + where, mask=inside, other=0).to(tl.float32)
        value = value * tl.load(scale + where, mask=inside, other=0).to(tl.float32)
        mine = (one < m)[:, None] & (column < k)[None, :]
        given = tl.load(x + one[:, None] * k + column[None, :], mask=mine, other=0).to(tl.float32)
        value = tl.where(inside, value, 0.0)
        total += tl.sum(given[:, None, :] * value[None, :, :], axis=2)
    target = out + (tl.program_id(1) * m + one)[:, None].to(tl.int64) * n + row[None, :]
    tl.store(target, total, mask=(one < m)[:, None] & real[None, :])


@triton.jit
def _trellis(
    x: _In, tiles: _In, scale: _In, values: _In, out: _In, n: _In, k: _In, m: _In, across: _In, share: _In,
    BITS: tl.constexpr, WINDOW: tl.constexpr, M: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """The same of tiles of 32 rows and 4 columns; `values`: what each window means."""
    TURN: tl.constexpr = 2 if BITS == 3 else 8 // BITS
    BYTES: tl.constexpr = 16 * BITS
    band = tl.program_id(0)
    line = tl.arange(0, 32)
    one = tl.arange(0, M)
    begin = tl.program_id(1) * share
    total = tl.zeros((M, 32), dtype=tl.float32)
    for at in range(begin, tl.minimum(begin + share, k), COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        spot = line[:, None] * 4 + (column % 4)[None, :]
        lower = spot % 64  # runs of the stream go alternately to the upper and the lower 16 rows
        bit = ((lower // TURN) * 2 * TURN + (spot // 64) * TURN + lower % TURN) * BITS
        inside = (column < k)[None, :] & (line >= 0)[:, None]
        tile = tiles + (band.to(tl.int64) * across + column // 4)[None, :] * BYTES
        byte = bit // 8
        word = tl.load(tile + byte, mask=inside, other=0).to(tl.int32)
        word = word | (tl.load(tile + (byte + 1) % BYTES, mask=inside, other=0).to(tl.int32) << 8)
        word = word | (tl.load(tile + (byte + 2) % BYTES, mask=inside, other=0).to(tl.int32) << 16)
        window = (word >> (bit % 8)) & ((1 << WINDOW) - 1)
        value = tl.load(values + window, mask=inside, other=0).to(tl.float32)
        mine = (one < m)[:, None] & (column < k)[None, :]
        given = tl.load(x + one[:, None] * k + column[None, :], mask=mine, other=0).to(tl.float32)
        total += tl.sum(given[:, None, :] * value[None, :, :], axis=2)
    row = band * 32 + line
    total = total * tl.load(scale + row, mask=row < n, other=0).to(tl.float32)[None, :]
    target = out + (tl.program_id(1) * m + one)[:, None].to(tl.int64) * n + row[None, :]
    tl.store(target, total, mask=(one < m)[:, None] & (row < n)[None, :])


def dense(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, points: Tensor, how: dict[str, Any]) -> Tensor:
    """float32 (m, n): x (m, k) times a weight of codes, transposed.

    Args:
        x: floating point, contiguous, at most 16 rows.
        codes: uint8 (n, bytes of a row), packed as the formats pack them.
        scale: float (n or 1, groups).
        zero: the same, or None.
        points: float32, what each code means.
        how: `bits` of a code; `group`, columns that share a scale; `table`, whether points are looked up, or
            counted from `first` on.
    """
    m, k = x.shape
    n = len(codes)
    share, out = _shares(m, n, k, -(-n // _ROWS), x.device)
    grid = (-(-n // _ROWS), len(out))
    _dense[grid](
        x, codes, scale, scale if zero is None else zero, points, out, n, k, m, codes.shape[1],
        scale.shape[1] if len(scale) > 1 else 0, how["group"], how["first"],
        share, BITS=how["bits"], TABLE=how["table"], ZERO=zero is not None, M=triton.next_power_of_2(m), ROWS=_ROWS,
        COLUMNS=_COLUMNS,
    )  # fmt: skip
    return out.sum(0) if len(out) > 1 else out[0]


def trellis(x: Tensor, tiles: Tensor, scale: Tensor, values: Tensor, bits: int) -> Tensor:
    """float32 (m, n): x (m, k) times a weight of trellis tiles, transposed.

    Args:
        x: floating point, contiguous, at most 16 rows.
        tiles: uint8 (bands of 32 rows, tiles across, 16 * bits).
        scale: bfloat16 (n, 1).
        values: int8 (2**L), what each window means.
        bits: of a weight.
    """
    (m, k), n = x.shape, len(scale)
    share, out = _shares(m, n, k, len(tiles), x.device)
    _trellis[(len(tiles), len(out))](
        x, tiles, scale, values, out, n, k, m, tiles.shape[1], share, BITS=bits,
        WINDOW=len(values).bit_length() - 1, M=triton.next_power_of_2(m), COLUMNS=_COLUMNS,
    )  # fmt: skip
    return out.sum(0) if len(out) > 1 else out[0]


def _shares(m: int, n: int, k: int, programs: int, device: torch.device) -> tuple[int, Tensor]:
    """How many columns a program takes, and room for what each share of them adds up to."""
    count = max(1, min(_PROGRAMS // max(1, programs), -(-k // (4 * _COLUMNS))))
    share = -(-k // count // _COLUMNS) * _COLUMNS
    return share, torch.empty(-(-k // share), m, n, dtype=torch.float32, device=device)
