"""ggml's block types (GGUF files: Q4_0 ... Q6_K and relatives) as formats.

Decoding is bit-exact with ggml's own dequantization. Encoding by itself is bit-exact with the reference for the types
whose reference is one formula (Q4_0 ... Q8_0, MXFP4, TQ2_0); the others search for their scales (`ggml_scales`), and
under error feedback (`ggml_coder`) all types with even steps or a table do. What cannot be written says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from bitfold.errors import FormatError, WeightError
from bitfold.formats.base import Params, Scale
from bitfold.formats.columns import Coder
from bitfold.formats.families import ggml_layouts as L
from bitfold.formats.families.ggml_coder import GgmlCoder
from bitfold.formats.families.ggml_scales import STRUCTURES
from bitfold.formats.families.ggml_vector_coder import VectorCoder
from bitfold.formats.families.ggml_vector_coder import encode as encode_vectors
from bitfold.formats.families.ggml_vectors import VECTORS, split_iq1_m, split_iq1_s
from bitfold.system.tensorinfo import TensorInfo

_CHUNK = 1 << 21  # weights at a time, so that temporaries stay in the cache and small beside the tensor


@dataclass(frozen=True)
class Ggml:
    """One ggml type. The only field of an (n, k) weight is `blocks`, uint8 (n, k / block * block_bytes).

    Args:
        name: name in FORMATS.
        block: (consecutive weights of a row, bytes) of a block.
        codes: (lowest, highest) value of a code before scaling.
        split: bytes (b, block bytes) -> parts.
        write: weights float32 (b, block) -> bytes (b, block bytes); None = decode only.
        levels: number of different codes; None: a code names several weights at once.
    """

    name: str
    block: tuple[int, int]
    codes: tuple[float, float]
    split: Callable[[Tensor], L.Parts]
    write: Callable[[Tensor], Tensor] | None
    levels: int | None
    plain = False
    grid = code = books = magnitudes = rescaled = decode_columns = None

    @property
    def ggml(self) -> str:
        """Name of the type."""
        return self.name

    @property
    def bits(self) -> Fraction:
        """Bits of a code for each weight, scales not counted (8/5 for five ternary digits in a byte)."""
        if self.levels is None:
            vectors = VECTORS.get(self.name)
            return Fraction(11, 8) if vectors is None else vectors.bits
        return Fraction(8, 5) if self.levels == 3 and self.bpw < 2 else Fraction((self.levels - 1).bit_length())

    @property
    def bpw(self) -> Fraction:
        """Bits per weight, exact: rows are whole blocks."""
        return Fraction(8 * self.block[1], self.block[0])

    @property
    def span(self) -> tuple[float, float]:
        """Smallest and largest code value at scale 1 and shift 0."""
        return self.codes

    @property
    def coder(self) -> Callable[[Tensor, Params | None, Tensor | None], Coder] | None:
        """Codes columns under error feedback; None for types without a search for scales."""
        structure, vectors = STRUCTURES.get(self.name), VECTORS.get(self.name)
        if structure is None and vectors is None:
            return None

        def start(w: Tensor, params: Params | None, importance: Tensor | None = None) -> Coder:
            self.layout(tuple(w.shape))  # raises where the rows are no whole blocks
            if vectors is not None:
                return VectorCoder(vectors, w, importance)
            assert structure is not None
            return GgmlCoder(self.block[0], structure, w, importance)

        return start

    @property
    def rows_at_once(self) -> int:
        """See `AnyFormat`: vectors are compared with all points in products of matrices."""
        return 256 if self.name in STRUCTURES else 1024

    @property
    def scale(self) -> Scale | None:
        """None: the scales are part of the blocks, no fit chooses them."""
        return None

    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        """dtype and shape of `blocks` for a weight (n, k) or (experts, n, k).

        Raises:
            FormatError: k is not a multiple of the block.
        """
        if shape[-1] % self.block[0]:
            hint = "choose a format with a free group size, such as int4-asym-g64, for this tensor"
            raise FormatError(f"{self.name} needs rows of a multiple of {self.block[0]}, not {shape[-1]}", hint=hint)
        return {"blocks": TensorInfo(torch.uint8, (*shape[:-1], shape[-1] // self.block[0] * self.block[1]))}

    def encode(self, w: Tensor, params: Params | None = None) -> dict[str, Tensor]:
        """Fields of the weight w (n, k), float; `params` must be None, the blocks choose their own scales.

        Raises:
            FormatError: a row length that is no multiple of the block, or a type that can only be read.
            WeightError: NaN or infinite weights.
        """
        if self.write is None:
            raise FormatError(f"{self.name} can be read but not written", hint=f"written are {', '.join(writable())}")
        if params is not None:
            raise FormatError(f"{self.name} chooses its own scales", hint="use it with the default fit")
        write = self.write
        return self._encode(w, lambda rows: write(rows.reshape(-1, self.block[0])))

    def weighted(self, w: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
        """See `AnyFormat`; of experts (e, n, k) importance is (k,) or (e, 1, k). Types without a search, and those that
        gain nothing by it, are written as by `encode`.

        Raises:
            FormatError, WeightError: as `encode`.
        """
        structure, vectors = STRUCTURES.get(self.name), VECTORS.get(self.name)
        if (structure is None and vectors is None) or self.levels == 256:
            return self.encode(w)
        if importance is not None and importance.dim() > 1:  # each expert has inputs of its own
            found = [self.weighted(one, row.flatten()) for one, row in zip(w, importance, strict=True)]
            return {"blocks": torch.stack([fields["blocks"] for fields in found])}

        def write(rows: Tensor) -> Tensor:
            if vectors is not None:
                return encode_vectors(vectors, rows, importance)
            assert structure is not None
            wide = None if importance is None else importance.expand_as(rows).reshape(-1, self.block[0])
            return structure.write(rows.reshape(-1, self.block[0]), wide)

        return self._encode(w, write)

    def _encode(self, w: Tensor, write: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Fields of a weight, a few rows (r, k) at a time."""
        info = self.layout(tuple(w.shape))["blocks"]
        out, k = torch.empty(info.shape, dtype=torch.uint8).view(-1, info.shape[-1]), w.shape[-1]
        rows, step = w.reshape(-1, k), max(1, _CHUNK // k)
        for at in range(0, len(rows), step):
            piece = rows[at : at + step].float()
            if not torch.isfinite(piece).all():
                raise WeightError("NaN or infinite weights")
            out[at : at + step] = write(piece).view(len(piece), -1)
        return {"blocks": out.view(info.shape)}

    def decode(self, fields: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """float32 weight of that shape, bit-exact with ggml's dequantization.

        Raises:
            FormatError: `blocks` is not what the shape needs.
        """
        info, blocks = self.layout(shape)["blocks"], fields["blocks"]
        if blocks.dtype != info.dtype or tuple(blocks.shape) != info.shape:
            raise FormatError(f"blocks of {self.name} {shape} must be uint8 {info.shape}, not {tuple(blocks.shape)}")
        return self._map(blocks, lambda raw: self.expand(raw)[0]).view(shape)

    def decode_rows(self, fields: Mapping[str, Tensor], shape: tuple[int, ...], index: Tensor) -> Tensor:
        """float32 rows (len(index), k) of an (n, k) weight."""
        return self.decode({"blocks": fields["blocks"][index]}, (len(index), shape[-1]))

    def steps(self, fields: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """float32 of `shape`: distance between neighbouring codes around each weight (the scale's magnitude)."""
        return self._map(fields["blocks"], lambda raw: self.expand(raw)[1]).view(shape)

    def expand(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and steps, float32 (b, block) each, of uint8 blocks (b, block bytes)."""
        parts = self.split(raw)
        values = parts.codes * parts.scale
        if parts.shift is not None:
            values += parts.shift
        return values.flatten(1), parts.scale.abs().expand_as(values).flatten(1)

    def describe(self) -> dict[str, Any]:
        """JSON-able description."""
        return {"family": "ggml", "type": self.name, "block": list(self.block)}

    def _map(self, blocks: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        raw = blocks.reshape(-1, self.block[1])
        out = torch.empty(len(raw), self.block[0], dtype=torch.float32, device=raw.device)
        for part in self._chunks(len(raw)):
            out[part] = function(raw[part])
        return out

    def _chunks(self, count: int) -> list[slice]:
        step = _CHUNK // self.block[0]
        return [slice(i, i + step) for i in range(0, count, step)]


def _inverse(d: Tensor) -> Tensor:
    """1/d, and 0 where the block is all zeros or so small that 1/d overflows (d is then 0 in half precision)."""
    inverse = 1 / d
    return torch.where(torch.isfinite(inverse), inverse, 0.0)


def _signed_extreme(w: Tensor) -> Tensor:
    """The element of largest magnitude of the last dimension, kept."""
    return w.gather(-1, w.abs().argmax(-1, keepdim=True))


def _symmetric(bits: int) -> Callable[[Tensor], Tensor]:
    """Q4_0 and Q5_0: the extreme maps exactly to the lowest code, truncation of x + 0.5 rounds."""
    half = 1 << (bits - 1)

    def write(w: Tensor) -> Tensor:
        d = _signed_extreme(w) / -half
        codes = (w * _inverse(d) + (half + 0.5)).to(torch.int32).clamp(0, 2 * half - 1)
        return L.join_legacy(codes, [d], bits)

    return write


def _affine(bits: int) -> Callable[[Tensor], Tensor]:
    """Q4_1 and Q5_1: codes count steps from the minimum."""
    top = (1 << bits) - 1

    def write(w: Tensor) -> Tensor:
        low = w.amin(1, keepdim=True)
        d = (w.amax(1, keepdim=True) - low) / top
        codes = ((w - low) * _inverse(d) + 0.5).to(torch.int32).clamp(0, top)
        return L.join_legacy(codes, [d, low], bits)

    return write


def _round_away(x: Tensor) -> Tensor:
    """Nearest integer, halves away from zero (C's roundf)."""
    a = x.abs()
    whole = a.floor()
    return x.sign() * (whole + (2 * (a - whole)).floor())


def _write_q8_0(w: Tensor) -> Tensor:
    d = w.abs().amax(1, keepdim=True) / 127
    codes = _round_away(w * _inverse(d)).to(torch.int8)
    return L.join_legacy(codes.view(torch.uint8), [d], 8)


def _write_mxfp4(w: Tensor) -> Tensor:
    top = w.abs().amax(1, keepdim=True)
    exponent = torch.frexp(top).exponent - 1  # floor(log2), exactly
    e = torch.where(top > 0, exponent - 2 + 127, 0).clamp(0, 254).to(torch.uint8)
    values = torch.tensor(L.E2M1_DOUBLED, dtype=torch.float32)
    codes = ((L.e8m0_half(e) * values)[:, None] - w[..., None]).abs().argmin(2)
    return torch.cat([e, L.unplanes(codes, 16, 4)], 1)


def _ternary(w: Tensor) -> tuple[Tensor, Tensor]:
    d = w.abs().amax(1, keepdim=True)
    return (_round_away(w * _inverse(d)) + 1).to(torch.int32), L.half_bytes(d)


def _write_tq2_0(w: Tensor) -> Tensor:
    codes, d = _ternary(w)
    return torch.cat([L.unplanes(codes, 32, 2), d], 1)


# Bytes of a block, and the largest magnitude.
_VECTORS = (("iq2_xxs", 66, 43), ("iq2_xs", 74, 43), ("iq2_s", 82, 43), ("iq3_xxs", 98, 62), ("iq3_s", 110, 15))


def _vectors(name: str, size: int, top: float) -> Ggml:
    vectors = VECTORS[name]
    return Ggml(name, (256, size), (-top, top), vectors.parts, lambda w: encode_vectors(vectors, w, None), None)


def _types() -> list[Ggml]:
    def k(name: str, size: int, codes: tuple[float, float], split: Any, write: Any, levels: int | None) -> Ggml:
        return Ggml(name, (256, size), codes, split, write, levels)

    return [
        Ggml("q4_0", (32, 18), (-8, 7), L.split_q4_0, _symmetric(4), 16),
        Ggml("q4_1", (32, 20), (0, 15), L.split_q4_1, _affine(4), 16),
        Ggml("q5_0", (32, 22), (-16, 15), L.split_q5_0, _symmetric(5), 32),
        Ggml("q5_1", (32, 24), (0, 31), L.split_q5_1, _affine(5), 32),
        Ggml("q8_0", (32, 34), (-128, 127), L.split_q8_0, _write_q8_0, 256),
        k("q2_k", 84, (0, 3), L.split_q2_k, STRUCTURES["q2_k"].write, 4),
        k("q3_k", 110, (-4, 3), L.split_q3_k, STRUCTURES["q3_k"].write, 8),
        k("q4_k", 144, (0, 15), L.split_q4_k, STRUCTURES["q4_k"].write, 16),
        k("q5_k", 176, (0, 31), L.split_q5_k, STRUCTURES["q5_k"].write, 32),
        k("q6_k", 210, (-32, 31), L.split_q6_k, STRUCTURES["q6_k"].write, 64),
        Ggml("iq4_nl", (32, 18), (-127, 113), L.split_iq4_nl, STRUCTURES["iq4_nl"].write, 16),
        k("iq4_xs", 136, (-127, 113), L.split_iq4_xs, STRUCTURES["iq4_xs"].write, 16),
        # OCP MXFP4's numbers in ggml's byte order; the plain `mxfp4` format keeps scales apart from codes.
        Ggml("ggml_mxfp4", (32, 17), (-12, 12), L.split_mxfp4, _write_mxfp4, 16),
        k("tq1_0", 54, (-1, 1), L.split_tq1_0, None, 3),
        k("tq2_0", 66, (-1, 1), L.split_tq2_0, _write_tq2_0, 3),
        *(_vectors(*facts) for facts in _VECTORS),
        k("iq1_s", 50, (-1.125, 1.125), split_iq1_s, None, None),
        k("iq1_m", 56, (-1.125, 1.125), split_iq1_m, None, None),
    ]


GGML: dict[str, Ggml] = {t.name: t for t in _types()}


def writable() -> list[str]:
    """Names of the types that `encode` can write."""
    return [t.name for t in GGML.values() if t.write is not None]
