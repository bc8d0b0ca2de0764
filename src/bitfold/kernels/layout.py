"""What the native loops need to know of a weight, found out without asking which format it is.

Any format made of a grid of at most 256 points, scales for rows (or runs of columns of a row) and perhaps zero points
qualifies; it shows so by its `grid`. So does a trellis, by its `code`: columns and a table. The codes stay where they
are: the loops read the canonical layout. Scales and zero points become one bfloat16 or float32 array each.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from bitfold.formats import Format, packing
from bitfold.formats.families.viterbi import TrellisCode, native_code
from bitfold.formats.grids import Grid
from bitfold.qtensor import QTensor

_STEP = 64  # columns that the widest instruction set takes at a time
_LEAST_GROUP = 16  # and the narrowest one
_SLACK = 8  # numbers


@dataclass(frozen=True)
class Points:
    """The grid as the loops see it: value = points[code] (at most 4 bits) = (u - offset) * unit.

    u = lut[code], or the code itself without a lut. `integers` is false where no such u exists (NF4): float arithmetic.
    """

    points: tuple[float, ...]
    offset: int = 0
    unit: float = 1.0
    lut: tuple[int, ...] = ()
    integers: bool = True


@dataclass(frozen=True)
class DenseSpec:
    """What the loops need to know of rows of codes, besides the tensors.

    Args:
        k: columns.
        bits: of a code.
        group: columns that share a scale; 0: the whole row.
        points: what the codes mean.
    """

    k: int
    bits: int
    group: int
    points: Points

    @property
    def integers(self) -> bool:
        """Whether products with rounded activations are exact in integers."""
        return self.points.integers

    def weight(self, core: Any, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Any:
        """The native object, which points into the tensors."""
        p = self.points
        grid = core.Grid(bits=self.bits, integers=p.integers, offset=p.offset, unit=p.unit, points=p.points, lut=p.lut)
        scales = core.Scales(
            scale=scale.data_ptr(),
            zero=0 if zero is None else zero.data_ptr(),
            bf16=scale.dtype == torch.bfloat16,
            group=self.group,
            groups=scale.shape[1],
        )
        return core.DenseWeight(codes.data_ptr(), scale.shape[0], self.k, grid, scales)


@dataclass(frozen=True)
class TrellisSpec:
    """The same of trellis tiles: columns, and the code."""

    k: int
    code: TrellisCode

    integers: ClassVar[bool] = True

    def weight(self, core: Any, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Any:
        """The native object, which points into the tensors."""
        return core.TrellisWeight(codes.data_ptr(), scale.shape[0], self.k, scale.data_ptr(), native_code(self.code))


Spec = DenseSpec | TrellisSpec


@functools.lru_cache(maxsize=4096)
def write_spec(spec: Spec) -> str:
    """As text: an operator of PyTorch takes tensors, numbers and strings."""
    return json.dumps(dataclasses.asdict(spec))


@functools.lru_cache(maxsize=4096)
def read_spec(text: str) -> Spec:
    """What `write_spec` wrote."""
    plain = json.loads(text)
    if "code" in plain:
        code: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in plain["code"].items()}
        return TrellisSpec(plain["k"], TrellisCode(**code))
    points: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in plain.pop("points").items()}
    return DenseSpec(**plain, points=Points(**points))


@dataclass(frozen=True)
class Layout:
    """A weight ready for the native loops; n rows, spec.k columns.

    Args:
        spec: what the tensors mean.
        codes: uint8 (n, bytes of a row), or trellis tiles (ceil(n / 32), ceil(k / 4), 16 * bits).
        scale: bfloat16 or float32 (n, groups).
        zero: the same, or None.
    """

    spec: Spec
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None

    @property
    def n(self) -> int:
        """Rows."""
        return self.scale.shape[0]

    def weight(self, core: Any) -> Any:
        """The native object, which points into the tensors."""
        return self.spec.weight(core, self.codes, self.scale, self.zero)


def read_points(points: Sequence[float], bits: int, *, zero: bool) -> Points | None:
    """How to compute with a grid; None if the loops cannot.

    Args:
        points: value of each code.
        bits: bits of a stored code.
        zero: whether zero points are subtracted; they then come less 2**(bits-1), so that codes are centred.
    """
    half = 2 ** (bits - 1)
    if zero:
        points = [p - half for p in points]
    if len(points) == 2**bits and all(p == i - half for i, p in enumerate(points)):
        return Points(tuple(points) if bits <= 4 else (), half)
    if zero or bits > 4:
        return None
    filled = tuple(points) + (0.0,) * (2**bits - len(points))
    for unit in (1.0, 0.5):
        whole = [p / unit for p in filled]
        low = int(min(whole))
        if bits in (1, 4) and all(p == int(p) for p in whole) and max(whole) - low <= 127:
            return Points(filled, -low, unit, tuple(int(p) - low for p in whole))
        if all(p == i + low for i, p in enumerate(whole[: len(points)])) and unit == 1.0:
            return Points(filled, -low)
    return Points(filled, integers=False)


def read_layout(q: QTensor) -> Layout | None:
    """The layout of a weight, or None if the native loops cannot multiply by it."""
    if len(q.shape) != 2 or 0 in q.shape:
        return None
    if q.format.code is not None:
        return _trellis_layout(q, q.format.code)
    return _grid_layout(q, q.format.grid) if q.format.grid is not None else None


def _trellis_layout(q: QTensor, code: TrellisCode) -> Layout:
    k = q.shape[1]
    tiles, scale = q.fields["tiles"].contiguous(), q.fields["scale"].contiguous()
    return Layout(TrellisSpec(k, code), tiles, scale)


def _grid_layout(q: QTensor, grid: Grid) -> Layout | None:
    form = cast(Format, q.format)  # what has a grid is one
    n, k = q.shape
    params = form.load_params(q.fields, q.shape)
    zero = None if params is None else params.zero_point
    trits = len(grid.points) == 3
    bits = 2 if trits else grid.code_bits
    points = read_points(grid.points, bits, zero=zero is not None)
    scale = torch.ones(1, 1) if params is None else params.scale
    blocks = form.blocks(q.shape)
    group = 0 if scale.shape[1] == 1 else _split(blocks.cols)
    if points is None or group is None or (scale.shape[0] != 1 and blocks.rows != 1):
        return None
    codes = q.fields["codes"]
    codes = packing.pack(packing.unpack_trits(codes, k), 2) if trits else codes.contiguous()
    arrays = [_spread(scale, n, k, group, blocks.cols)]
    if zero is not None:
        arrays.append(_spread(zero - 2 ** (bits - 1), n, k, group, blocks.cols))
    arrays = _compact(arrays)
    return Layout(DenseSpec(k, bits, group, points), codes, arrays[0], arrays[1] if zero is not None else None)


def _split(cols: int) -> int | None:
    """The group the loops use for blocks of `cols` columns: the same, or a divisor whose scale is repeated."""
    group = cols if cols % _STEP == 0 else math.gcd(cols, _STEP)
    return group if group >= _LEAST_GROUP else None


def _spread(values: Tensor, n: int, k: int, group: int, cols: int) -> Tensor:
    """(1 or n, blocks) -> (n, groups): repeated for every row and every group, zeros for columns that only pad."""
    if group:
        values = values.repeat_interleave(cols // group, dim=1)
        needed = -(-k // _STEP) * _STEP // group if group < _STEP else -(-k // group)
        values = torch.nn.functional.pad(values[:, :needed], (0, max(0, needed - values.shape[1])))
    return values.expand(n, -1).contiguous()


def _compact(arrays: list[Tensor]) -> list[Tensor]:
    """bfloat16 if no value changes by it: half the traffic."""
    small = [a.to(torch.bfloat16) for a in arrays]
    exact = all(torch.equal(s.float(), a) for s, a in zip(small, arrays, strict=True))
    return [with_slack(a) for a in (small if exact else [a.float() for a in arrays])]


def with_slack(values: Tensor) -> Tensor:
    """The same numbers with some readable bytes behind the last: the loops load whole vectors of scales."""
    end = values.storage_offset() + values.numel()
    if values.is_contiguous() and values.untyped_storage().nbytes() >= (end + _SLACK) * values.element_size():
        return values
    room = torch.zeros(values.numel() + _SLACK, dtype=values.dtype)
    room[: values.numel()] = values.flatten()
    return room[: values.numel()].view(values.shape)
