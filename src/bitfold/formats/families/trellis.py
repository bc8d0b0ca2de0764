"""`trellis-1` ... `trellis-4`: k bits a weight and one scale a row, at the error of the best fixed-rate codes.

Scalar formats name each weight's value by that weight's own bits. Here a weight's value is named by its own bits and
those of the weights after it (a window sliding over the bits of a tile), so that k bits choose among far more than 2**k
values, and the encoder searches the path through all windows that fits the tile best (Viterbi). The window is hashed
linearly over GF(2) into a small trained table: a handful of byte instructions decode 64 weights.

Marcellin and Fischer 1990 (trellis-coded quantization); Tseng et al. 2024, arXiv 2406.11235 (weights, tail-biting).
Made for rows that are nearly normal: rotate the inputs first. Specification: docs/trellis.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfold.errors import FormatError, WeightError
from bitfold.formats.base import Params, Scale
from bitfold.formats.families.rowscale import check_rows, gaussian_row_scale, store_row_scale
from bitfold.formats.families.trellis_tables import CODES
from bitfold.formats.families.viterbi import TILE, TILE_COLS, TILE_ROWS, TrellisCode, decode_tiles, encode_tiles
from bitfold.system import backend
from bitfold.system.tensorinfo import TensorInfo

__all__ = ["TRELLIS", "Trellis", "read_trellis"]

_CHUNK = 1 << 22  # weights decoded or encoded at a time


@dataclass(frozen=True)
class Trellis:
    """A trellis code with a bfloat16 scale for each row.

    Stored fields of an (n, k) weight: `tiles` uint8 (ceil(n / 32), ceil(k / 4), 16 * bits), one tile for each 32 rows
    x 4 columns, and `scale` bfloat16 (n, 1). bfloat16, because codes are chosen under the rounded scale: its short
    mantissa costs nothing, and it cannot overflow or lose tiny rows as float16 does. Rows and columns beyond the weight
    cost nothing when encoding and are dropped when decoding. Three-dimensional weights have the experts in front.
    """

    name: str
    code: TrellisCode
    plain = False
    grid = books = magnitudes = ggml = decode_columns = weighted = None
    rows_at_once = 32 * TILE_ROWS  # the search has a tile in each lane of its vectors

    @property
    def bits(self) -> Fraction:
        """Bits of a code, exact."""
        return Fraction(self.code.bits)

    @property
    def bpw(self) -> Fraction:
        """Bits per weight of full tiles; the scale of each row adds 16 / k."""
        return Fraction(self.code.bits)

    @property
    def levels(self) -> int:
        """Number of different values at scale 1."""
        return len(set(self.code.table))

    @property
    def span(self) -> tuple[float, float]:
        """Smallest and largest value at scale 1."""
        return float(min(self.code.table)), float(max(self.code.table))

    @property
    def scale(self) -> Scale | None:
        """None: the scale of a row follows from its root mean square, see `row_scale`; no fit chooses it."""
        return None

    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        """dtype and shape of each stored field of a weight (n, k) or (experts, n, k)."""
        *lead, n, k = shape
        tiles = (*lead, -(-n // TILE_ROWS), -(-k // TILE_COLS), self.code.tile_bytes)
        return {"tiles": TensorInfo(torch.uint8, tiles), "scale": TensorInfo(torch.bfloat16, (*lead, n, 1))}

    def row_scale(self, w: Tensor) -> Tensor:
        """bfloat16 (n, 1): the scale under which a normally distributed row has the least error.

        Raises:
            FormatError: a scale that bfloat16 cannot hold.
        """
        return gaussian_row_scale(w, self.code.sigma, self.name)

    def store_scale(self, scale: Tensor) -> Tensor:
        """The scales as they are stored: bfloat16 (n, 1), of any float (n,) or (n, 1).

        Raises:
            FormatError: NaN, infinite, or another shape.
        """
        return store_row_scale(scale, self.name)

    def encode(self, w: Tensor, params: Params | None = None, *, thorough: bool = False) -> dict[str, Tensor]:
        """Fields of the weight w (n, k), float: each tile by itself at its least squared error.

        Args:
            w: the weight.
            params: row scales (n, 1); None = `row_scale`.
            thorough: search longer, see `encode_tiles`.

        Raises:
            FormatError: scales that do not fit the weight.
            WeightError: NaN or infinite weights.
        """
        scale = self.row_scale(w) if params is None else self.store_scale(params.scale)
        info = self.layout(tuple(w.shape))["tiles"]
        tiles = torch.empty(info.shape, dtype=info.dtype, device=w.device)
        step = max(1, _CHUNK // max(1, w.shape[1]) // TILE_ROWS) * TILE_ROWS
        for row in range(0, len(w), step):
            part = slice(row, row + step)
            down = slice(row // TILE_ROWS, (row + step) // TILE_ROWS)
            tiles[down], _ = self._encode_rows(w[part], check_rows(scale, len(w), self.name)[part], thorough)
        return {"tiles": tiles, "scale": scale}

    def encode_block(self, w: Tensor, scale: Tensor, *, thorough: bool = False) -> tuple[Tensor, Tensor]:
        """Encode some columns of a weight, as solvers with error feedback do.

        Args:
            w: (n, 4 c) float, neighbouring columns from a multiple of 4 on.
            scale: (n, 1) or (n,), as `store_scale` returned it.
            thorough: search longer, see `encode_tiles`.

        Returns:
            tiles uint8 (ceil(n / 32), c, 16 * bits), a slice of the field `tiles`; the decoded block, float32 (n, 4 c).

        Raises:
            FormatError: columns that do not fill tiles, or scales that do not fit the rows.
            WeightError: NaN or infinite weights.
        """
        if w.dim() != 2 or w.shape[1] % TILE_COLS:
            raise FormatError(f"{self.name} encodes {TILE_COLS} columns at a time, not a block {tuple(w.shape)}")
        scale = check_rows(self.store_scale(scale), len(w), self.name)
        tiles, values = self._encode_rows(w, scale, thorough)
        return tiles, _from_tiles(values, tiles.shape[:2], (w.shape[0], w.shape[1])).float() * scale

    def coder(self, w: Tensor, params: Params | None, importance: Tensor | None = None) -> TileCoder:
        """Codes the columns of w (n, k) four by four, tiles jointly, under given row scales or `row_scale`."""
        scale = self.row_scale(w) if params is None else self.store_scale(params.scale)
        return TileCoder(self, scale, w.shape[1])

    def rescaled(self, fields: Mapping[str, Tensor], factor: Tensor) -> dict[str, Tensor]:
        """The same codes with the scale of each row times `factor` (n, 1)."""
        return {**fields, "scale": self.store_scale(fields["scale"].float() * factor)}

    def decode(self, fields: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """float32 weight of that shape: table value times scale.

        Raises:
            FormatError: a field is not what the shape needs.
        """
        self._check(fields, shape)
        *lead, n, k = shape
        down, across = self.layout((n, k))["tiles"].shape[:2]
        tiles = fields["tiles"].reshape(-1, across, self.code.tile_bytes)
        if backend.at_once(tiles):
            return self._decode_at_once(tiles, shape) * fields["scale"].float()
        out = torch.empty(len(tiles) * TILE_ROWS, k, dtype=torch.float32)
        step = max(1, _CHUNK // TILE // max(1, across))
        for row in range(0, len(tiles), step):
            part = tiles[row : row + step]
            values = decode_tiles(self.code, part.reshape(-1, self.code.tile_bytes))
            whole = (len(part) * TILE_ROWS, k)
            out[row * TILE_ROWS : (row + step) * TILE_ROWS] = _from_tiles(values, (len(part), across), whole)
        rows = out.view(prod(lead), down * TILE_ROWS, k)[:, :n].reshape(shape)
        return rows * fields["scale"].float()

    def _decode_at_once(self, tiles: Tensor, shape: tuple[int, ...]) -> Tensor:
        """float32 table values of a weight of that shape, tiles (bands, across, bytes)."""
        values = decode_tiles(self.code, tiles.reshape(-1, self.code.tile_bytes))
        *lead, n, k = shape
        whole = _from_tiles(values, tiles.shape[:2], (len(tiles) * TILE_ROWS, k)).float()
        return whole.view(prod(lead), -1, k)[:, :n].reshape(shape)

    def decode_rows(self, fields: Mapping[str, Tensor], shape: tuple[int, ...], index: Tensor) -> Tensor:
        """float32 rows (len(index), k) of an (n, k) weight; decodes the 32 rows of each tile that is met.

        Raises:
            FormatError: a field is not what the shape needs.
        """
        self._check(fields, shape)
        bands, where = torch.unique(index // TILE_ROWS, return_inverse=True)
        wide = (len(bands) * TILE_ROWS, shape[1])
        tiles = fields["tiles"][bands].reshape(-1, self.code.tile_bytes)
        rows = _from_tiles(decode_tiles(self.code, tiles), (len(bands), fields["tiles"].shape[1]), wide)
        return rows[where * TILE_ROWS + index % TILE_ROWS].float() * fields["scale"][index].float()

    def describe(self) -> dict[str, Any]:
        """JSON-able description, complete enough to decode by."""
        code = {"bits": self.code.bits, "columns": list(self.code.columns), "table": list(self.code.table)}
        return {
            "family": "trellis",
            **code,
            "sigma": self.code.sigma,
            "tile": [TILE_ROWS, TILE_COLS],
            "scale": "bfloat16",
        }

    def _encode_rows(self, w: Tensor, scale: Tensor, thorough: bool) -> tuple[Tensor, Tensor]:
        if not torch.isfinite(w).all():
            raise WeightError("NaN or infinite weights")
        x = w.detach().float() / torch.where(scale == 0, 1.0, scale)
        x = torch.where(scale == 0, 0.0, x)
        n, k = x.shape
        down, across = -(-n // TILE_ROWS), -(-k // TILE_COLS)
        # A scale far too small makes the quotient infinite; the search clamps it anyway.
        x = F.pad(x.nan_to_num(), (0, across * TILE_COLS - k, 0, down * TILE_ROWS - n), value=torch.nan)
        x = x.view(down, TILE_ROWS, across, TILE_COLS).transpose(1, 2).reshape(-1, TILE)
        tiles, values = encode_tiles(self.code, x, thorough=thorough)
        return tiles.view(down, across, self.code.tile_bytes), values

    def _check(self, fields: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
        for name, info in self.layout(shape).items():
            field = fields.get(name)
            if field is None or field.dtype != info.dtype or tuple(field.shape) != info.shape:
                found = "nothing" if field is None else f"{field.dtype} {tuple(field.shape)}"
                raise FormatError(f"{name} of {self.name} {shape} must be {info.dtype} {info.shape}, not {found}")


class TileCoder:
    """Columns of a trellis weight from left to right, see `bitfold.formats.columns.Coder`.

    Args:
        format: the trellis.
        scale: bfloat16 (n, 1), one for each row.
        width: columns k of the weight.
    """

    step = TILE_COLS
    at_once = 0
    feed = under = refit = None

    def __init__(self, format: Trellis, scale: Tensor, width: int) -> None:
        self._format, self._scale = format, scale
        shape = format.layout((len(scale), width))["tiles"].shape
        self._tiles = torch.empty(shape, dtype=torch.uint8, device=scale.device)

    def encode(self, w: Tensor, start: int) -> Tensor:
        """Tiles of the columns w (n, up to 4) at `start`; what they decode to, float32."""
        whole = F.pad(w, (0, -w.shape[1] % TILE_COLS)) if w.shape[1] % TILE_COLS else w
        tiles, values = self._format.encode_block(whole, self._scale)
        self._tiles[:, start // TILE_COLS] = tiles[:, 0]
        return values[:, : w.shape[1]]

    def fields(self) -> dict[str, Tensor]:
        """All tiles, and the scales."""
        return {"tiles": self._tiles, "scale": self._scale}


def _from_tiles(values: Tensor, grid: tuple[int, ...], shape: tuple[int, int]) -> Tensor:
    """(tiles, 128) -> (n, k), padding dropped."""
    down, across = grid
    whole = values.view(down, across, TILE_ROWS, TILE_COLS).transpose(1, 2).reshape(down * TILE_ROWS, -1)
    return whole[: shape[0], : shape[1]]


def read_trellis(name: str, description: Mapping[str, Any]) -> Trellis:
    """The trellis format that a checkpoint describes.

    Raises:
        FormatError: a description that is incomplete or not of this family.
    """
    try:
        numbers = (int(description["bits"]), [int(c) for c in description["columns"]], description["table"])
        code = TrellisCode(
            numbers[0], tuple(numbers[1]), tuple(int(v) for v in numbers[2]), float(description["sigma"])
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"the description of {name!r} is not one of a trellis: {error!r}") from error
    found = Trellis(name, code)
    if found.describe() != dict(description):
        raise FormatError(
            f"the trellis {name!r} has tiles or scales that are not known here", hint="a newer bitfold may"
        )
    return found


TRELLIS: dict[str, Trellis] = {name: Trellis(name, code) for name, code in CODES.items()}
