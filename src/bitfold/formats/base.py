"""`Grid` + `Scale` = `Format`: inert descriptions of how numbers are stored.

A format fixes exactly one thing, bytes -> numbers: `value = (point[code] - zero_point) * scale`, computed in float32.
Which codes and scales are chosen is the business of fits and solvers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, prod
from typing import Any

import torch

from bitfold.errors import FormatError
from bitfold.formats.columns import GridCoder
from bitfold.formats.grids import Grid
from bitfold.formats.scale_blocks import Block, Blocks
from bitfold.system import backend
from bitfold.system.parallel import parallel_map
from bitfold.system.tensorinfo import TensorInfo

Store = Grid | torch.dtype
Fields = Mapping[str, torch.Tensor]
_CHUNK = 1 << 17  # elements coded at a time, so that temporaries stay in the cache
_BYTES = 32  # of temporaries for each element that an accelerator codes


def store_name(store: Store | None) -> str | None:
    """Name under which a store is written into descriptions."""
    if store is None:
        return None
    return store.name if isinstance(store, Grid) else str(store).removeprefix("torch.")


def store_bits(store: Store | None) -> Fraction:
    """Bits of one stored number."""
    if store is None:
        return Fraction(0)
    return store.bits if isinstance(store, Grid) else Fraction(store.itemsize * 8)


@dataclass(frozen=True)
class Scale:
    """One number for each block of weights, itself stored in few bits.

    Args:
        block: (rows, columns) that share the scale; 0 = all of them. For a scale of a scale the block counts entries
            of the flattened array of scales: (0, 0) = one for the tensor, (1, c) = c consecutive ones.
        store: how the scale is stored.
        offset: how the zero point is stored; None for formats without one.
        of: scale of the scale (`store` is then a Grid and holds scale / scale-of-the-scale).
    """

    block: Block
    store: Store
    offset: Store | None = None
    of: Scale | None = None

    def describe(self) -> dict[str, Any]:
        """JSON-able description."""
        text = {"block": list(self.block), "store": store_name(self.store), "offset": store_name(self.offset)}
        return {**text, "of": self.of.describe() if self.of else None}


@dataclass
class Params:
    """Real-valued scales and zero points, one for each block: float32 (blocks down, blocks across)."""

    scale: torch.Tensor
    zero_point: torch.Tensor | None = None


# A fit chooses scales: (weight (n, k), a format with scales, importance of each weight or None) -> Params.
Fit = Callable[[torch.Tensor, Any, "torch.Tensor | None"], Params]


@dataclass(frozen=True)
class Format:
    """A grid with (or without) scales.

    Stored fields of an (n, k) weight: `codes` uint8 (n, packed bytes of a row); `scale` (down, across); `zero_point`
    (down, across) or packed along the last dimension; `scale_of_scale` (number of second-level blocks,).
    Three-dimensional weights (experts, n, k) have the same fields with the experts in front.
    """

    name: str
    grid: Grid
    scale: Scale | None = None
    plain = False
    code = books = magnitudes = ggml = weighted = None

    @property
    def levels(self) -> int:
        """Different values of a code; a NaN is none."""
        return sum(1 for point in set(self.grid.points) if point == point)

    @property
    def bits(self) -> Fraction:
        """Bits of a code."""
        return self.grid.bits

    @property
    def span(self) -> tuple[float, float]:
        """Smallest and largest value at scale 1."""
        return self.grid.span

    @property
    def bpw(self) -> Fraction:
        """Bits per weight where all blocks are full; numbers stored once for a row or a tensor do not count here."""
        return self.grid.bits + _overhead(self.scale)

    def blocks(self, shape: tuple[int, ...]) -> Blocks:
        """How a weight of shape (n, k) falls into scale blocks."""
        n, k = shape[-2:]
        return Blocks(n, k, self.scale.block if self.scale else (0, 0))

    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        """dtype and shape of each stored field of a weight of that shape."""
        *lead, n, k = shape
        info = {"codes": TensorInfo(torch.uint8, (*lead, n, self.grid.packed_bytes(k)))}
        if self.scale is None:
            return info
        down, across = self.blocks(shape).grid
        info["scale"] = _array_info(self.scale.store, (*lead, down, across), packed=False)
        if self.scale.offset is not None:
            info["zero_point"] = _array_info(self.scale.offset, (*lead, down, across), packed=True)
        if self.scale.of is not None:
            count = _second_level(self.scale.of, down * across)
            info["scale_of_scale"] = _array_info(self.scale.of.store, (*lead, count), packed=False)
        return info

    def encode(self, w: torch.Tensor, params: Params | None) -> dict[str, torch.Tensor]:
        """Fields of the weight w (n, k), float: each code is the nearest point under the *stored* scales."""
        fields = {} if params is None else self.store_params(params)
        stored = self.load_params(fields, w.shape)
        codes = torch.empty(w.shape[0], self.grid.packed_bytes(w.shape[1]), dtype=torch.uint8, device=w.device)
        blocks = self.blocks(w.shape)

        def job(chunk: _Chunk) -> None:
            piece = self.codes_of(w[chunk.rows].float(), _params_rows(stored, chunk.blocks, blocks))
            codes[chunk.rows] = self.grid.pack(piece)

        if w.device.type == "cpu":
            parallel_map(job, self._row_chunks(tuple(w.shape), _CHUNK))
        else:
            for chunk in self._row_chunks(tuple(w.shape), backend.scratch(w.device) // _BYTES):
                job(chunk)
        return {"codes": codes, **fields}

    def codes_of(self, w: torch.Tensor, params: Params | None) -> torch.Tensor:
        """uint8 codes (n, k), not packed, of float32 w under given scales."""
        if self.scale is None or params is None:
            return self.grid.encode(w)
        blocks = self.blocks(w.shape)
        scaled = blocks.split(w) * _inverse(params.scale)[..., None]
        if params.zero_point is not None:
            scaled += params.zero_point[..., None]
        return blocks.join(self.grid.encode(scaled))

    def values_of(self, codes: torch.Tensor, params: Params | None) -> torch.Tensor:
        """float32 values (n, k) of unpacked codes under given scales: the law of the format."""
        points = self.grid.decode(codes)
        if self.scale is None or params is None:
            return points
        blocks = self.blocks(codes.shape)
        values = blocks.split(points)
        if params.zero_point is not None:
            values = values - params.zero_point[..., None]
        return blocks.join(values * params.scale[..., None])

    def decode(self, fields: Fields, shape: tuple[int, ...]) -> torch.Tensor:
        """float32 weight of that shape."""
        if len(shape) > 2:
            slices = [self.decode({f: t[i] for f, t in fields.items()}, shape[1:]) for i in range(shape[0])]
            return torch.stack(slices)
        params = self.load_params(fields, shape)
        if backend.at_once(fields["codes"]):
            return self.values_of(self.grid.unpack(fields["codes"], shape[1]), params)
        out = torch.empty(shape, dtype=torch.float32)
        blocks = self.blocks(shape)

        def job(chunk: _Chunk) -> None:
            codes = self.grid.unpack(fields["codes"][chunk.rows], shape[1])
            out[chunk.rows] = self.values_of(codes, _params_rows(params, chunk.blocks, blocks))

        parallel_map(job, self._row_chunks(shape, _CHUNK))
        return out

    def decode_rows(self, fields: Fields, shape: tuple[int, ...], index: torch.Tensor) -> torch.Tensor:
        """float32 rows (len(index), k) of an (n, k) weight, without decoding the others."""
        params = self.load_params(fields, shape)
        codes = self.grid.unpack(fields["codes"][index], shape[1])
        blocks = self.blocks(shape)
        if params is None:
            return self.grid.decode(codes)
        per_row = Format(self.name, self.grid, Scale((1, blocks.block[1]), torch.float32)) if self.scale else self
        return per_row.values_of(codes, _params_rows(params, index // blocks.rows, blocks))

    def decode_columns(self, fields: Fields, shape: tuple[int, ...], index: torch.Tensor) -> torch.Tensor:
        """float32 columns (n, len(index)) of an (n, k) weight, without decoding the others."""
        params, points = self.load_params(fields, shape), self.grid.decode(self.grid.take(fields["codes"], index))
        if params is None:
            return points
        blocks = self.blocks(shape)
        where = torch.arange(shape[0], device=index.device)[:, None] // blocks.rows, index // blocks.cols
        zero = 0.0 if params.zero_point is None else params.zero_point[where]
        return (points - zero) * params.scale[where]

    def coder(self, w: torch.Tensor, params: Params | None, importance: torch.Tensor | None = None) -> GridCoder:
        """Codes the columns of w (n, k) one by one under given scales."""
        return GridCoder(self, (w.shape[0], w.shape[1]), params, w.device)

    @property
    def rows_at_once(self) -> int | None:
        """See `AnyFormat`: steps between integers are made in the native core, others column by column by PyTorch."""
        return 256 if self.grid.uniform and self.scale is not None else None

    def rescaled(self, fields: Fields, factor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same codes with the scales of each row times `factor` (n, 1); unchanged where scales span rows."""
        if self.scale is None or self.scale.block[0] != 1 or isinstance(self.scale.store, Grid):
            return dict(fields)
        scale = (fields["scale"].float() * factor).to(self.scale.store)
        return {**fields, "scale": scale}

    def store_params(self, params: Params) -> dict[str, torch.Tensor]:
        """Fields that hold the scales (and zero points), rounded to their stores."""
        assert self.scale is not None
        fields: dict[str, torch.Tensor] = {}
        scale = params.scale.float()
        if self.scale.of is not None:
            fields["scale_of_scale"], scale = _normalise(scale, self.scale)
        fields["scale"] = _store(scale, self.scale.store, packed=False)
        if self.scale.offset is not None:
            assert params.zero_point is not None
            fields["zero_point"] = _store(params.zero_point, self.scale.offset, packed=True)
        return fields

    def load_params(self, fields: Fields, shape: tuple[int, ...]) -> Params | None:
        """Scales and zero points as float32 (down, across)."""
        if self.scale is None:
            return None
        down, across = self.blocks(shape).grid
        scale = _load(fields["scale"], self.scale.store, across, packed=False)
        if self.scale.of is not None:
            factor = fields["scale_of_scale"].float()
            per = ceil(down * across / factor.numel()) if self.scale.of.block == (0, 0) else self.scale.of.block[1]
            scale = scale * factor.repeat_interleave(per)[: down * across].view(down, across)
        if self.scale.offset is None:
            return Params(scale)
        return Params(scale, _load(fields["zero_point"], self.scale.offset, across, packed=True))

    def describe(self) -> dict[str, Any]:
        """JSON-able description, complete enough to decode by."""
        scale = self.scale.describe() if self.scale else None
        return {"family": "grid", "grid": self.grid.name, "bits": float(self.grid.bits), "scale": scale}

    def _row_chunks(self, shape: tuple[int, ...], count: int) -> list[_Chunk]:
        """Row ranges of about `count` elements that do not cut a block, with the block rows they cover."""
        blocks = self.blocks(shape)
        n, k = shape[-2:]
        if self.scale is not None and self.scale.block[0] == 0:
            step, per_row = max(1, count // max(k, 1)), False
        else:
            step, per_row = max(1, count // max(k, 1) // blocks.rows) * blocks.rows, True
        chunks = []
        for start in range(0, n, step):
            stop = min(start + step, n)
            index = slice(start // blocks.rows, ceil(stop / blocks.rows)) if per_row else slice(0, 1)
            chunks.append(_Chunk(slice(start, stop), index))
        return chunks


@dataclass(frozen=True)
class _Chunk:
    rows: slice
    blocks: slice


def _params_rows(params: Params | None, index: slice | torch.Tensor, blocks: Blocks) -> Params | None:
    if params is None or blocks.grid[0] == 1:
        return params
    return Params(params.scale[index], None if params.zero_point is None else params.zero_point[index])


def _overhead(scale: Scale | None) -> Fraction:
    if scale is None or 0 in scale.block:
        return Fraction(0)
    own = store_bits(scale.store) + store_bits(scale.offset)
    return (own + _overhead(scale.of)) / prod(scale.block)


def _array_info(store: Store, shape: tuple[int, ...], *, packed: bool) -> TensorInfo:
    if not isinstance(store, Grid):
        return TensorInfo(store, shape)
    return TensorInfo(torch.uint8, (*shape[:-1], store.packed_bytes(shape[-1])) if packed else shape)


def _second_level(of: Scale, count: int) -> int:
    return 1 if of.block == (0, 0) else ceil(count / of.block[1])


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1/scale, and 0 where the scale is 0: an all-zero block has no direction and must not make NaN."""
    return torch.where(scale == 0, 0.0, 1.0 / scale)


def _normalise(scale: torch.Tensor, spec: Scale) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale of the scales (stored) and the scales divided by it."""
    assert spec.of is not None
    assert isinstance(spec.store, Grid)
    assert not isinstance(spec.of.store, Grid)
    flat = scale.flatten()
    per = flat.numel() if spec.of.block == (0, 0) else spec.of.block[1]
    groups = torch.nn.functional.pad(flat, (0, -flat.numel() % per)).view(-1, per)
    factor = (groups.amax(1) / spec.store.span[1]).to(spec.of.store)
    scaled = groups * _inverse(factor.float())[:, None]
    return factor, scaled.flatten()[: flat.numel()].view(scale.shape)


def _store(x: torch.Tensor, store: Store, *, packed: bool) -> torch.Tensor:
    if isinstance(store, Grid):
        codes = store.encode(x)
        return store.pack(codes) if packed else codes
    stored = x.to(store)
    if not torch.isfinite(stored).all():
        raise FormatError(f"a scale or zero point exceeds the range of {store_name(store)}")
    return stored


def _load(field: torch.Tensor, store: Store, length: int, *, packed: bool) -> torch.Tensor:
    if isinstance(store, Grid):
        return store.decode(store.unpack(field, length) if packed else field)
    return field.float()
