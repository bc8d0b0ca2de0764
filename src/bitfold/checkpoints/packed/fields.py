"""Codes, scales and zero points of other programs as the fields of our formats: the same numbers, nothing rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from bitfold.formats import Format, Scale, get_format
from bitfold.formats.base import Store, store_name
from bitfold.formats.grids import E2M1, E4M3, E5M2, NF4, Grid, ints, uints
from bitfold.formats.packing import packed_length, unpack
from bitfold.qtensor import QTensor

_FP8 = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}
_SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


def along_rows(words: Tensor, bits: int, length: int) -> Tensor:
    """uint8 codes (..., length) of rows of whole words, each row one string of bits, least significant first."""
    raw = words.contiguous().view(torch.uint8)
    return unpack(raw[..., : packed_length(length, bits)].contiguous(), bits, length)


def integers(codes: Tensor, bits: int, scale: Tensor, zero: Tensor | None, group: int) -> QTensor:
    """Integers with scales: (code - zero) * scale.

    Args:
        codes: uint8 (n, k), unsigned: signed ones plus 2**(bits - 1).
        bits: of a code.
        scale: float16, bfloat16 or float32 (n or 1, groups of a row).
        zero: uint8 of the same shape, unsigned as the codes; None: 2**(bits - 1).
        group: columns that share a scale.
    """
    grid = ints(bits) if zero is None else uints(bits)
    fields = {"codes": grid.pack(codes), "scale": scale.contiguous()}
    if zero is not None:
        fields["zero_point"] = grid.pack(zero)
    shape = (codes.shape[0], codes.shape[1])
    offset = None if zero is None else grid
    name = f"int{bits}{'' if zero is None else '-asym'}"
    return QTensor(_format(name, grid, shape, scale, group, offset), shape, fields)


def affine(codes: Tensor, bits: int, scale: Tensor, zero: Tensor, group: int) -> QTensor:
    """As `integers`, with zero points in floating point."""
    grid, shape = uints(bits), (codes.shape[0], codes.shape[1])
    fields = {"codes": grid.pack(codes), "scale": scale.contiguous(), "zero_point": zero.contiguous()}
    return QTensor(_format(f"int{bits}-affine", grid, shape, scale, group, zero.dtype), shape, fields)


def floats8(w: Tensor, scale: Tensor, group: int) -> QTensor:
    """FP8 w (n, k) with scales (n or 1, groups of a row), `group` columns each."""
    grid, shape = _FP8[w.dtype], (w.shape[0], w.shape[1])
    fields = {"codes": w.contiguous().view(torch.uint8), "scale": scale.contiguous()}
    return QTensor(_format(f"fp8-{grid.name}", grid, shape, scale, group), shape, fields)


def tabled(grid: Grid, codes: Tensor, scale: Tensor, group: int) -> QTensor:
    """Numbers of a table of 16: codes uint8 (n, k / 2), the first of two in the low half; scales as of `floats8`."""
    shape = (codes.shape[0], 2 * codes.shape[1])
    fields = {"codes": codes.contiguous(), "scale": scale.contiguous()}
    return QTensor(_format(grid.name, grid, shape, scale, group), shape, fields)


def normal_floats(codes: Tensor, scale: Tensor, group: int) -> QTensor:
    """NF4, see `tabled`."""
    return tabled(NF4, codes, scale, group)


def mxfp4(codes: Tensor, scale: Tensor) -> QTensor:
    """OCP MXFP4: codes uint8 (..., n, k / 2), the first of two in the low half; scale uint8 (..., n, k / 32)."""
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    return QTensor(get_format("mxfp4"), shape, {"codes": codes.contiguous(), "scale": scale.contiguous()})


def nvfp4(codes: Tensor, scale: Tensor, whole: Tensor) -> QTensor:
    """NVFP4: codes uint8 (n, k / 2), scale E4M3 (n, k / 16), multiplied by one float32 (1,)."""
    shape = (codes.shape[0], 2 * codes.shape[1])
    fields = {"codes": codes.contiguous(), "scale": scale.view(torch.uint8).contiguous(), "scale_of_scale": whole}
    return QTensor(get_format("nvfp4"), shape, fields)


def floats4(codes: Tensor, scale: Tensor, group: int) -> QTensor:
    """E2M1, see `tabled`."""
    return tabled(E2M1, codes, scale, group)


def by_columns(codes: Tensor, scale: Tensor, zero: Tensor, index: Tensor) -> Tensor:
    """float32 (n, k) of integers whose groups are not runs of columns, nor whole ones.

    Args:
        codes, scale, zero: as of `integers`.
        index: the group of each column, int64 (k,).
    """
    return codes.float().sub_(zero.float()[:, index]).mul_(scale.float()[:, index])


def _format(
    kind: str, grid: Grid, shape: tuple[int, int], scale: Tensor, group: int, offset: Store | None = None
) -> Format:
    """The format of such a weight, by the shape and the dtype of its scales."""
    across = scale.shape[1]
    rows = 0 if scale.shape[0] == 1 < shape[0] else 1
    block = (rows, 0 if across == 1 else group)
    scope = "tensor" if block == (0, 0) else "row" if not block[1] else f"g{group}" if rows else f"c{group}"
    store = _SHORT[str(store_name(scale.dtype))]
    return Format(f"{kind}-{scope}-{store}", grid, Scale(block, scale.dtype, offset))
