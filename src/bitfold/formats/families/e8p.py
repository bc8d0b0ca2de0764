"""`e8p`: 2 bits a weight; eight weights at a time take the nearest of 2**16 points of the E8 lattice.

The half-odd vectors with an even sum, D8 + 1/2, moved by +1/4 or by -1/4, together are E8 moved by 1/4. A point takes
16 bits: its magnitudes are one of 256 vectors, seven of its signs are free and the eighth follows from the even sum,
and one bit tells the move (E8P: Tseng et al. 2024, arXiv 2402.04396). Decoding is a look-up; encoding is exact, and
nearly all of it is sorting: among all arrangements of the same magnitudes, the best one gives the larger magnitude to
the larger weight.

Made for rows that are nearly normal: rotate the inputs first. Layout: docs/format.md.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfold.errors import FormatError, WeightError
from bitfold.formats.base import Params, Scale
from bitfold.formats.families.rowscale import check_rows, gaussian_row_scale, store_row_scale
from bitfold.system import backend, native
from bitfold.system.parallel import parallel_map
from bitfold.system.tensorinfo import TensorInfo

__all__ = ["E8P", "E8PFormat", "nearest_codes", "points"]

BLOCK = 8
_SIGMA = 4.14  # root mean square of normal weights in quarters, where the mean square error is least
_CHUNK = 1 << 13  # blocks encoded at a time: an (8, blocks) array stays in the cache
_CLAMP = 64.0  # far outside of all points; keeps products finite
# (entries of 3/2, entries of 5/2) of all magnitudes with norm**2 <= 10: every arrangement of them is a point.
_SHELLS = ((0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (0, 1), (1, 1))


@functools.cache
def magnitudes() -> Tensor:
    """float32 (256, 8): entries 1/2, 3/2, 5/2. By norm, then in lexicographic order: the 227 of norm**2 <= 10, and 29
    of norm**2 = 12 without an entry of 5/2."""
    every = itertools.product((0.5, 1.5, 2.5), repeat=BLOCK)
    normed = [(sum(v * v for v in a), a) for a in every]
    kept = sorted((norm, a) for norm, a in normed if norm <= 10 or (norm == 12 and 2.5 not in a))
    return torch.tensor([a for _, a in kept[:256]])


@functools.cache
def _quarters() -> Tensor:
    return (4 * magnitudes()).to(torch.uint8)


@functools.cache
def points() -> Tensor:
    """int8 (65536, 8): four times the point of each code, odd numbers in -11..11."""
    code = torch.arange(1 << 16)
    size = magnitudes()[code & 255]
    negative = (code[:, None] >> 8 >> torch.arange(7)) & 1
    last = (size.sum(1).long() + negative.sum(1)) & 1  # the sum of a vector of D8 + 1/2 is even
    signs = 1 - 2 * torch.cat([negative, last[:, None]], 1)
    return (4 * size * signs + (1 - 2 * (code >> 15))[:, None]).to(torch.int8)


@backend.constant
def _words(device: torch.device) -> Tensor:
    """int64 (65536): each point as one number."""
    return _words_on(device)


@functools.cache
def _words_on(device: torch.device) -> Tensor:
    return points().view(torch.int64)[:, 0].to(device)


@functools.cache
def _index_of_magnitudes() -> Tensor:
    """int32 (3**8): the row of `magnitudes()` whose entries less 1/2 are the digits of the number, first one lowest."""
    digits = (magnitudes() - 0.5).long()
    index = torch.zeros(3**BLOCK, dtype=torch.int32)
    index[(digits * 3 ** torch.arange(BLOCK)).sum(1)] = torch.arange(256, dtype=torch.int32)
    return index


@functools.cache
def _outer_threes() -> Tensor:
    """float32 (29, 8): 1 where the magnitudes of norm**2 = 12 are 3/2."""
    return (magnitudes()[227:] > 1).float()


def nearest_codes(x: Tensor) -> Tensor:
    """int32 (blocks,): the code of the point nearest to each column of x (8, blocks), float32, in units of the lattice.

    Exact: for each move, the best arrangement of each shell follows from sorting; only the 29 outermost vectors, which
    are no whole shell, are compared one by one, and only where they can win.
    """
    x = x.clamp(-_CLAMP, _CLAMP)
    lean = x.sum(0) / 4
    plus, minus = _Nearest(x - 0.25), _Nearest(x + 0.25)
    down = minus.gain - lean > plus.gain + lean
    y = torch.where(down, minus.y, plus.y)
    threes = torch.where(down, minus.threes, plus.threes)
    size = _magnitudes_of(y, threes, torch.where(down, minus.fives, plus.fives))
    outer = torch.where(down, minus.outer, plus.outer)
    size = torch.where(outer >= 0, _outer_threes()[outer.clamp_min(0)].T + 0.5, size)
    return _compose(y, size) | down.int() << 15


class _Nearest:
    """The best vector of D8 + 1/2 for each column of y (8, blocks), by its shell.

    gain = <vector, y> - |vector|**2 / 2, larger is nearer. `outer` is the number of one of the 29, or -1.
    """

    def __init__(self, y: Tensor) -> None:
        self.y = y
        size = y.abs()
        odd = ((y < 0).sum(0) & 1).bool()
        ranked = _descending(size)
        half = ranked.sum(0) / 2
        # The sum of a vector is even if the number of its negative entries has the parity of the number of its 3/2.
        # Where it has not, the smallest entry, which is a 1/2, goes against the sign of its weight.
        even_half, odd_half = torch.where(odd, half - ranked[7], half), torch.where(odd, half, half - ranked[7])
        top = torch.cat([torch.zeros_like(half)[None], ranked[:5].cumsum(0)])
        self.gain = torch.full_like(half, -torch.inf)
        self.threes, self.fives = torch.zeros_like(half), torch.zeros_like(half)
        for threes, fives in _SHELLS:
            gain = (odd_half if threes & 1 else even_half) + top[threes + fives] + top[fives] - (1 + threes + 3 * fives)
            better = gain > self.gain
            self.gain = torch.where(better, gain, self.gain)
            self.threes.masked_fill_(better, threes)
            self.fives.masked_fill_(better, fives)
        self.outer = torch.full(half.shape, -1, dtype=torch.int64)
        maybe = (odd_half + top[5] - 6 > self.gain).nonzero()[:, 0]
        if len(maybe):
            self._try_outer(size[:, maybe], odd[maybe], maybe)

    def _try_outer(self, size: Tensor, odd: Tensor, where: Tensor) -> None:
        threes = _outer_threes()
        against = ((threes[..., None] + 0.5) * size).amin(1)  # the cheapest entry to turn, if one must be
        whole = size.new_zeros(len(threes), size.shape[1])
        for i in range(BLOCK):  # in this order everywhere: a product of matrices would add up as its library likes
            whole += threes[:, i, None] * size[i]
        gains = whole + size.sum(0) / 2 - 6 - torch.where(odd, 0.0, 2 * against)
        gain, which = gains.max(0)
        better = gain > self.gain[where]
        self.gain[where] = torch.where(better, gain, self.gain[where])
        self.outer[where] = torch.where(better, which, -1)


def _descending(x: Tensor) -> Tensor:
    """Each column of x (8, blocks) sorted, largest first: a network of 19 comparisons (Batcher's)."""
    rows = list(x)
    pairs = ((0, 1), (2, 3), (4, 5), (6, 7), (0, 2), (1, 3), (4, 6), (5, 7), (1, 2), (5, 6), (0, 4), (1, 5), (2, 6))
    for a, b in (*pairs, (3, 7), (2, 4), (3, 5), (1, 2), (3, 4), (5, 6)):
        rows[a], rows[b] = torch.maximum(rows[a], rows[b]), torch.minimum(rows[a], rows[b])
    return torch.stack(rows)


def _magnitudes_of(y: Tensor, threes: Tensor, fives: Tensor) -> Tensor:
    """float32 (8, blocks): so many 5/2 and 3/2 for the largest entries of each column, 1/2 for the others."""
    size = y.abs()
    rank = torch.zeros_like(y)
    for a, b in itertools.combinations(range(BLOCK), 2):
        behind = size[a] >= size[b]
        rank[b] += behind
        rank[a] += ~behind
    return 0.5 + (rank < threes + fives).float() + (rank < fives)


def _compose(y: Tensor, size: Tensor) -> Tensor:
    """int32 (blocks,): the code, without the move, of magnitudes (8, blocks) under the best allowed signs for y."""
    negative = y < 0
    wrong = ((negative.sum(0) + size.sum(0).long()) & 1).bool()
    turned = (y.abs() * size).argmin(0)
    negative = negative ^ ((torch.arange(BLOCK)[:, None] == turned) & wrong)
    digits = torch.einsum("ij,i->j", size - 0.5, 3.0 ** torch.arange(BLOCK)).int()
    code = _index_of_magnitudes()[digits]
    for i in range(BLOCK - 1):
        code |= negative[i].int() << 8 + i
    return code


@dataclass(frozen=True)
class E8PFormat:
    """Codes of the E8P points with a bfloat16 scale for each row.

    Stored fields of an (n, k) weight: `codes` uint8 (n, 2 * ceil(k / 8)), one little-endian 16-bit code for eight
    columns, and `scale` bfloat16 (n, 1): a weight is `points()` times the scale. Columns beyond the weight are coded as
    zeros and dropped when decoding. Three-dimensional weights have the experts in front.
    """

    name: str = "e8p"
    plain = False
    grid = levels = code = books = ggml = decode_columns = weighted = rows_at_once = None

    @property
    def bits(self) -> Fraction:
        """Bits of a code, for each weight."""
        return Fraction(2)

    @property
    def bpw(self) -> Fraction:
        """Bits per weight of whole blocks; the scale of each row adds 16 / k."""
        return Fraction(2)

    @property
    def span(self) -> tuple[float, float]:
        """Smallest and largest value at scale 1."""
        return -11.0, 11.0

    @property
    def scale(self) -> Scale | None:
        """None: the scale of a row follows from its root mean square; no fit chooses it."""
        return None

    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        """dtype and shape of each stored field of a weight (n, k) or (experts, n, k)."""
        *lead, n, k = shape
        codes = TensorInfo(torch.uint8, (*lead, n, 2 * -(-k // BLOCK)))
        return {"codes": codes, "scale": TensorInfo(torch.bfloat16, (*lead, n, 1))}

    def encode(self, w: Tensor, params: Params | None = None) -> dict[str, Tensor]:
        """Fields of the weight w (n, k), float: each eight columns by the nearest point.

        Args:
            w: the weight.
            params: row scales (n, 1); None = root mean square of the row / 4.14.

        Raises:
            FormatError: scales that do not fit the weight.
            WeightError: NaN or infinite weights.
        """
        scale = self._row_scale(w, params)
        spread = check_rows(scale, len(w), self.name)
        codes = torch.empty(len(w), 2 * -(-w.shape[1] // BLOCK), dtype=torch.uint8)
        step = max(1, _CHUNK * BLOCK // max(1, w.shape[1]))

        def job(row: int) -> None:
            part = slice(row, row + step)
            codes[part] = _bytes(_encode_rows(w[part], spread[part]))

        parallel_map(job, range(0, len(w), step))
        return {"codes": codes, "scale": scale}

    def coder(self, w: Tensor, params: Params | None, importance: Tensor | None = None) -> BlockCoder:
        """Codes the columns of w (n, k) eight by eight, under given row scales or those of the rows' magnitudes."""
        scale = self._row_scale(w, params)
        check_rows(scale, len(w), self.name)
        return BlockCoder(self, scale, w.shape[1])

    def rescaled(self, fields: Mapping[str, Tensor], factor: Tensor) -> dict[str, Tensor]:
        """The same codes with the scale of each row times `factor` (n, 1)."""
        return {**fields, "scale": store_row_scale(fields["scale"].float() * factor, self.name)}

    def decode(self, fields: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """float32 weight of that shape: point times scale."""
        k = shape[-1]
        codes = fields["codes"].reshape(-1, fields["codes"].shape[-1])
        scale = fields["scale"].reshape(-1, 1).float()
        if backend.at_once(codes):
            return (_decode_rows(codes)[:, :k] * scale).view(shape)
        if hasattr(backend.core_for(codes), "LatticeWeight"):
            return _decode_native(codes, fields["scale"], k).view(shape)
        out = torch.empty(len(codes), k, dtype=torch.float32)
        step = max(1, _CHUNK * BLOCK // max(1, k))

        def job(row: int) -> None:
            part = slice(row, row + step)
            torch.mul(_decode_rows(codes[part])[:, :k], scale[part], out=out[part])

        parallel_map(job, range(0, len(codes), step))
        return out.view(shape)

    def magnitudes(self) -> Tensor:
        """uint8 (256, 8): four times the magnitudes, in the order of the low byte of a code."""
        return _quarters()

    def decode_rows(self, fields: Mapping[str, Tensor], shape: tuple[int, ...], index: Tensor) -> Tensor:
        """float32 rows (len(index), k) of an (n, k) weight."""
        part = {name: field[index] for name, field in fields.items()}
        return self.decode(part, (len(index), shape[1]))

    def describe(self) -> dict[str, Any]:
        """JSON-able description, complete enough to decode by."""
        return {"family": "e8p", "bits": 2, "block": BLOCK, "scale": "bfloat16"}

    def _row_scale(self, w: Tensor, params: Params | None) -> Tensor:
        if params is None:
            return gaussian_row_scale(w, _SIGMA, self.name)
        return store_row_scale(params.scale, self.name)


class BlockCoder:
    """Columns of an E8P weight, see `bitfold.formats.columns.Coder`.

    Args:
        format: the format.
        scale: bfloat16 (n, 1), one for each row.
        width: columns k of the weight.
    """

    step = BLOCK
    at_once = 0
    feed = under = refit = None

    def __init__(self, format: E8PFormat, scale: Tensor, width: int) -> None:
        self._stored, self._scale = scale, scale.float()
        self._codes = torch.empty(format.layout((len(scale), width))["codes"].shape, dtype=torch.uint8)

    def encode(self, w: Tensor, start: int) -> Tensor:
        """Codes of the columns w (n, up to 8) at `start`; what they decode to, float32."""
        codes = _encode_rows(w, self._scale)
        at = start // BLOCK * 2
        self._codes[:, at : at + 2] = _bytes(codes)
        return points()[codes[:, 0]][:, : w.shape[1]] * self._scale

    def fields(self) -> dict[str, Tensor]:
        """All codes, and the scales."""
        return {"codes": self._codes, "scale": self._stored}


def _encode_rows(w: Tensor, scale: Tensor) -> Tensor:
    """int32 codes (n, ceil(k / 8)) of w (n, k) under scales (n, 1)."""
    if not torch.isfinite(w).all():
        raise WeightError("NaN or infinite weights")
    x = w.float() * torch.where(scale == 0, 0.0, 0.25 / scale)
    x = F.pad(x.nan_to_num(), (0, -x.shape[1] % BLOCK))
    return nearest_codes(x.reshape(-1, BLOCK).T.contiguous()).view(len(w), -1)


def _bytes(codes: Tensor) -> Tensor:
    """uint8 (n, 2 c) of int32 codes (n, c): low byte first."""
    return torch.stack([codes & 255, codes >> 8], -1).to(torch.uint8).flatten(1)


def _decode_rows(packed: Tensor) -> Tensor:
    """int8 (n, 8 c) of uint8 (n, 2 c)."""
    pairs = packed.view(len(packed), -1, 2).int()
    table = _words(packed.device)
    return table[pairs[..., 0] | pairs[..., 1] << 8].view(torch.int8).view(len(packed), -1)


def _decode_native(codes: Tensor, scale: Tensor, k: int) -> Tensor:
    """float32 (n, k) of packed codes (n, bytes) and as many bfloat16 scales."""
    core = native.core()
    assert core is not None
    n, codes, scale = len(codes), codes.contiguous(), F.pad(scale.reshape(-1), (0, 8))
    weight = core.LatticeWeight(codes.data_ptr(), n, k, scale.data_ptr(), _quarters().data_ptr())
    out = torch.empty(n, k, dtype=torch.float32)
    core.dequantize(weight, 0, n, out.data_ptr(), native.threads())
    return out


def read_e8p(name: str, description: Mapping[str, Any]) -> E8PFormat:
    """The E8P format that a checkpoint describes; FormatError for another block or scale."""
    found = E8PFormat(name)
    if found.describe() != dict(description):
        raise FormatError(f"the E8P codes of {name!r} are not known here", hint="a newer bitfold may know them")
    return found


E8P: dict[str, E8PFormat] = {"e8p": E8PFormat()}
