"""QTensor: a quantized weight, complete in itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod

import torch

from bitfold.errors import FormatError
from bitfold.formats import AnyFormat
from bitfold.system.tensorinfo import require_rows

_MANY = 1 << 12  # times
ALIGNED = 256  # rows: a multiple of all tiles


@dataclass(frozen=True)
class QTensor:
    """A weight stored in few bits.

    Args:
        format: the number format.
        shape: shape of the weight, (n, k) or (experts, n, k).
        fields: the stored tensors by name, as `format.layout(shape)` describes them.

    Raises:
        FormatError: a field is missing, superfluous, or has another dtype or shape than the format says.
    """

    format: AnyFormat
    shape: tuple[int, ...]
    fields: Mapping[str, torch.Tensor]

    def __post_init__(self) -> None:
        layout = self.format.layout(self.shape)
        if set(layout) != set(self.fields):
            raise FormatError(f"{self.format.name} stores {sorted(layout)}, not {sorted(self.fields)}")
        for name, info in layout.items():
            field = self.fields[name]
            if field.dtype != info.dtype or tuple(field.shape) != info.shape:
                found = f"{field.dtype} {tuple(field.shape)}"
                raise FormatError(
                    f"field {name!r} of {self.format.name} for a weight of shape {self.shape} must be"
                    f" {info.dtype} {info.shape}, not {found}"
                )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as floating point, of `shape`; exact in float32, rounded once for other dtypes."""
        return self.format.decode(self.fields, self.shape).to(dtype)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """float32 rows (len(index), k) of an (n, k) weight.

        Raises:
            UsageError: a row that it does not have.
        """
        require_rows(index, self.shape[0], "the weight")
        return self.format.decode_rows(self.fields, self.shape, index)

    def to(self, device: torch.device) -> QTensor:
        """The same on another device."""
        return QTensor(self.format, self.shape, {name: field.to(device) for name, field in self.fields.items()})

    def expert(self, index: int) -> QTensor:
        """One (n, k) weight out of an (experts, n, k) stack; shares memory."""
        return QTensor(self.format, self.shape[1:], {name: field[index] for name, field in self.fields.items()})

    @property
    def nbytes(self) -> int:
        """Stored bytes, all fields counted."""
        return sum(field.numel() * field.element_size() for field in self.fields.values())

    @property
    def bpw(self) -> Fraction:
        """Stored bits per weight, exact, all fields counted."""
        return Fraction(8 * self.nbytes, max(1, prod(self.shape)))


def stack(parts: list[QTensor]) -> QTensor:
    """(experts, n, k) out of equally shaped (n, k) weights of one format."""
    first = parts[0]
    fields = {name: torch.stack([p.fields[name] for p in parts]) for name in first.fields}
    return QTensor(first.format, (len(parts), *first.shape), fields)


def rows_stack(format: AnyFormat, shapes: Sequence[tuple[int, int]]) -> bool:
    """Whether weights (n_i, k), stacked rows upon rows and quantized as one, can be taken apart again.

    So it is if every field of the whole is the fields of the parts, one upon the other: no scale, and no tile, belongs
    to two of them.
    """
    parts = [format.layout(shape) for shape in shapes]
    whole = format.layout((sum(n for n, _ in shapes), shapes[0][1]))
    many = [format.layout((_MANY * n, k)) for n, k in shapes[:-1]]  # a block only partly filled would show
    return all(
        info.shape[0] == sum(p[name].shape[0] for p in parts)
        and all(p[name].shape[1:] == info.shape[1:] for p in parts)
        and all(m[name].shape[0] == _MANY * p[name].shape[0] for m, p in zip(many, parts[:-1], strict=True))
        for name, info in whole.items()
    )


def row_ranges(format: AnyFormat, shape: tuple[int, int], weights: int) -> list[slice]:
    """Ranges of rows with about so many weights that can be quantized one by one; all rows where they cannot."""
    n, k = shape
    step = max(ALIGNED, weights // max(1, k) // ALIGNED * ALIGNED)
    found = [slice(at, min(at + step, n)) for at in range(0, n, step)]
    apart = len(found) > 1 and rows_stack(format, [(part.stop - part.start, k) for part in found])
    return found if apart else [slice(0, n)]


def split_rows(q: QTensor, shapes: Sequence[tuple[int, int]]) -> list[QTensor]:
    """The weights of these shapes that were stacked, see `rows_stack`."""
    layouts = [q.format.layout(shape) for shape in shapes]
    fields = {name: torch.split(f, [p[name].shape[0] for p in layouts]) for name, f in q.fields.items()}
    return [QTensor(q.format, shape, {name: f[i] for name, f in fields.items()}) for i, shape in enumerate(shapes)]


def cut_rows(q: QTensor, first: int, stop: int) -> QTensor:
    """Rows first to stop - 1 of an (n, k) weight, sharing memory.

    Raises:
        FormatError: a tile or a scale belongs to these and to other rows.
    """
    n, k = q.shape
    sizes = [(size, k) for size in (first, stop - first, n - stop)]
    shapes = [shape for shape in sizes if shape[0]]
    if len(shapes) == 1:
        return q
    if not rows_stack(q.format, shapes):
        what = (
            f"rows {first} to {stop - 1} of {n} cannot be taken alone: {q.format.name} has tiles or scales across them"
        )
        raise FormatError(what)
    return split_rows(q, shapes)[1 if first else 0]


def cut_columns(q: QTensor, first: int, stop: int) -> QTensor:
    """Columns first to stop - 1 of an (n, k) weight of codes with scales of rows or groups.

    Raises:
        FormatError: the format has none of these, or the columns begin or end inside a group or a byte.
    """
    n, k = q.shape
    if (first, stop) == (0, k):
        return q
    grid, scale = q.format.grid, q.format.scale
    wrong = f"columns {first} to {stop - 1} of {k} cannot be taken alone: {q.format.name}"
    if grid is None or scale is None or scale.of is not None or scale.block[0] != 1:
        raise FormatError(f"{wrong} is no format of codes with scales of rows")
    group = scale.block[1] or k
    cuts = [at for at in (first, stop) if at != k]
    if any((at % 5 if grid.trits else at * grid.code_bits % 8) for at in cuts):
        raise FormatError(f"{wrong} has codes across bytes there")
    if scale.block[1] and any(at % group for at in cuts):
        raise FormatError(f"{wrong} has groups of {group}")
    parts = slice(first // group, -(-stop // group)) if scale.block[1] else slice(None)
    fields = dict(q.fields)
    fields["codes"] = q.fields["codes"][:, grid.packed_bytes(first) : grid.packed_bytes(stop)].contiguous()
    fields["scale"] = q.fields["scale"][:, parts].contiguous()
    if "zero_point" in fields:
        fields["zero_point"] = _zeros(q, parts)
    return QTensor(q.format, (n, stop - first), fields)


def _zeros(q: QTensor, parts: slice) -> torch.Tensor:
    """The zero points of these groups."""
    zero, scale, grid = q.fields["zero_point"], q.format.scale, q.format.grid
    if scale is None or grid is None or scale.offset != grid:  # numbers, not packed
        return zero[:, parts].contiguous()
    return grid.pack(grid.unpack(zero, q.fields["scale"].shape[1])[:, parts].contiguous())
