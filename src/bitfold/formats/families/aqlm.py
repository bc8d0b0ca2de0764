"""`aqlm-MxB`: eight weights at a time as the sum of M entries, each of a codebook of 2**B of its own.

M x B / 8 bits a weight, the codebooks stored with the tensor and one scale for each row (Egiazarian et al. 2024,
arXiv 2401.06118). The books are learned from the weight itself, so that no rotation is needed, and small ones (2**8
entries) keep look-ups in the cache. Layout: docs/format.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfold.errors import FormatError, WeightError
from bitfold.formats import packing
from bitfold.formats.base import Params, Scale
from bitfold.formats.families.codebooks import WIDTH, beam_search, train_books, values_of
from bitfold.formats.families.rowscale import check_rows, gaussian_row_scale, store_row_scale
from bitfold.system import backend
from bitfold.system.tensorinfo import TensorInfo

__all__ = ["ADDITIVE", "Additive", "parse_additive", "read_additive"]

_LARGEST = 8.0  # entry, in units of the row scale: far beyond what normal rows need
_CHUNK = 1 << 18  # weights decoded at a time
_NAME = re.compile(r"aqlm-(?P<books>[1-8])x(?P<bits>[2-8])")


@dataclass(frozen=True)
class Additive:
    """M codebooks of 2**B vectors of 8, and a bfloat16 scale for each row.

    Stored fields of an (n, k) weight: `codes` uint8 (n, packed bytes), M codes of B bits for each eight columns, packed
    as the codes of other formats are; `codebooks` float16 (M, 2**B, 8); `scale` bfloat16 (n, 1). Columns beyond the
    weight are coded as zeros and dropped when decoding. Three-dimensional weights have the experts in front.
    """

    name: str
    books: int
    code_bits: int
    plain = False
    grid = levels = code = magnitudes = ggml = decode_columns = weighted = rows_at_once = None

    @property
    def bits(self) -> Fraction:
        """Bits of the codes, for each weight."""
        return Fraction(self.books * self.code_bits, WIDTH)

    @property
    def bpw(self) -> Fraction:
        """Bits per weight of a large tensor; codebooks and row scales are counted by `QTensor.bpw`."""
        return self.bits

    @property
    def span(self) -> tuple[float, float]:
        """Smallest and largest value that the encoder gives at scale 1."""
        return -_LARGEST * self.books, _LARGEST * self.books

    @property
    def scale(self) -> Scale | None:
        """None: the scale of a row is its root mean square; no fit chooses it."""
        return None

    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        """dtype and shape of each stored field of a weight (n, k) or (experts, n, k)."""
        *lead, n, k = shape
        codes = packing.packed_length(-(-k // WIDTH) * self.books, self.code_bits)
        return {
            "codes": TensorInfo(torch.uint8, (*lead, n, codes)),
            "codebooks": TensorInfo(torch.float16, (*lead, self.books, 1 << self.code_bits, WIDTH)),
            "scale": TensorInfo(torch.bfloat16, (*lead, n, 1)),
        }

    def encode(self, w: Tensor, params: Params | None = None) -> dict[str, Tensor]:
        """Fields of the weight w (n, k), float: books trained on its rows over their scales, entries by beam search.

        Raises:
            WeightError: NaN or infinite weights.
        """
        coder = self.coder(w, params)
        for at in range(0, w.shape[1], coder.step):
            coder.encode(w[:, at : at + coder.step], at)
        return coder.fields()

    def coder(self, w: Tensor, params: Params | None, importance: Tensor | None = None) -> BookCoder:
        """Codes the columns of w (n, k) eight by eight, by books trained on w."""
        if not torch.isfinite(w).all():
            raise WeightError("NaN or infinite weights")
        scale = gaussian_row_scale(w, 1.0, self.name) if params is None else store_row_scale(params.scale, self.name)
        spread = check_rows(scale, len(w), self.name)
        vectors = groups_of(w.float() * torch.where(spread == 0, 0.0, 1 / spread)).reshape(-1, WIDTH)
        return BookCoder(self, train_books(vectors, self.books, 1 << self.code_bits, 0), scale, w.shape[1])

    def store(self, codes: Tensor, books: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """The fields of codes (n, groups, M), books float (M, 2**B, 8) and scales (n, 1)."""
        packed = packing.pack(codes.reshape(len(codes), -1).to(torch.uint8), self.code_bits)
        return {"codes": packed, "codebooks": store_books(books), "scale": store_row_scale(scale, self.name)}

    def round_books(self, books: Tensor) -> Tensor:
        """Books as they are stored, in float32."""
        return store_books(books).float()

    def codes_of(self, fields: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """int64 (n, groups, M), unpacked."""
        groups = -(-shape[-1] // WIDTH)
        codes = packing.unpack(fields["codes"], self.code_bits, groups * self.books)
        return codes.view(-1, groups, self.books).long()

    def rescaled(self, fields: Mapping[str, Tensor], factor: Tensor) -> dict[str, Tensor]:
        """The same codes with the scale of each row times `factor` (n, 1)."""
        return {**fields, "scale": store_row_scale(fields["scale"].float() * factor, self.name)}

    def decode(self, fields: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """float32 weight of that shape: the sum of the entries, times the scale."""
        if len(shape) > 2:
            parts = [self.decode({f: t[i] for f, t in fields.items()}, shape[1:]) for i in range(shape[0])]
            return torch.stack(parts)
        return self.decode_rows(fields, shape, torch.arange(shape[0], device=fields["codes"].device))

    def decode_rows(self, fields: Mapping[str, Tensor], shape: tuple[int, ...], index: Tensor) -> Tensor:
        """float32 rows (len(index), k) of an (n, k) weight."""
        books, k = fields["codebooks"].float(), shape[1]
        if backend.at_once(index):
            return self._rows_of(books, fields, index, k)
        out = torch.empty(len(index), k, dtype=torch.float32, device=index.device)
        step = max(1, _CHUNK // max(1, k))
        for at in range(0, len(index), step):
            out[at : at + step] = self._rows_of(books, fields, index[at : at + step], k)
        return out

    def _rows_of(self, books: Tensor, fields: Mapping[str, Tensor], rows: Tensor, k: int) -> Tensor:
        codes = self.codes_of({"codes": fields["codes"][rows]}, (len(rows), k)).view(-1, self.books)
        return values_of(books, codes).view(len(rows), -1)[:, :k] * fields["scale"][rows].float()

    def describe(self) -> dict[str, Any]:
        """JSON-able description, complete enough to decode by."""
        return {
            "family": "additive",
            "books": self.books,
            "bits": self.code_bits,
            "block": WIDTH,
            "codebook": "float16",
            "scale": "bfloat16",
        }


class BookCoder:
    """Columns of a weight under given books, see `bitfold.formats.columns.Coder`.

    Args:
        format: the format.
        books: float32 (M, 2**B, 8).
        scale: bfloat16 (n, 1), one for each row.
        width: columns k of the weight.
    """

    step = WIDTH
    at_once = 0
    feed = under = refit = None

    def __init__(self, format: Additive, books: Tensor, scale: Tensor, width: int) -> None:
        self._format, self._stored = format, scale
        self._books = store_books(books)
        self._codes = torch.zeros(len(scale), -(-width // WIDTH), format.books, dtype=torch.int64)

    def encode(self, w: Tensor, start: int) -> Tensor:
        """Codes of the columns w (n, c) at `start`; what they decode to, float32."""
        scale, books = self._stored.float(), self._books.float()
        vectors = groups_of(w.float() * torch.where(scale == 0, 0.0, 1 / scale))
        codes = beam_search(vectors.reshape(-1, WIDTH), books)
        at = start // WIDTH
        self._codes[:, at : at + vectors.shape[1]] = codes.view(len(w), -1, self._format.books)
        return values_of(books, codes).view(len(w), -1)[:, : w.shape[1]] * scale

    def fields(self) -> dict[str, Tensor]:
        """All codes, the books and the scales."""
        return self._format.store(self._codes, self._books, self._stored)


def groups_of(w: Tensor) -> Tensor:
    """(n, k) -> (n, ceil(k / 8), 8), zeros behind."""
    return F.pad(w, (0, -w.shape[1] % WIDTH)).view(len(w), -1, WIDTH)


def store_books(books: Tensor) -> Tensor:
    """The books as they are stored: float16."""
    return books.clamp(-_LARGEST, _LARGEST).to(torch.float16)


def parse_additive(name: str) -> Additive | None:
    """The format of a name like aqlm-2x8."""
    match = _NAME.fullmatch(name)
    return None if match is None else Additive(name, int(match["books"]), int(match["bits"]))


def read_additive(name: str, description: Mapping[str, Any]) -> Additive:
    """The additive format that a checkpoint describes; FormatError when it is not known here."""
    try:
        found = Additive(name, int(description["books"]), int(description["bits"]))
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"the description of {name!r} is damaged: {error!r}") from error
    if found.describe() != dict(description) or not 1 <= found.books <= 8 or not 2 <= found.code_bits <= 8:
        raise FormatError(f"the codebooks of {name!r} are not known here", hint="a newer bitfold may know them")
    return found


ADDITIVE: dict[str, Additive] = {f"aqlm-{m}x8": Additive(f"aqlm-{m}x8", m, 8) for m in range(1, 5)}
