"""Byte layouts of ggml's vector types: IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S; of IQ1_S and IQ1_M reading only.

A code names the magnitudes of 4 or 8 neighbouring weights at once (`ggml_points`), and every weight has a sign. Where
eight signs take 7 bits, the eighth is what makes the number of negative ones even. A block of 256 has a half-precision
number d, and 16 or 32 weights share an odd whole number that it is multiplied with.
Layout of each type: ggml-common.h and dequantize_row_* of https://github.com/ggml-org/ggml.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from bitfold.formats.families.ggml_layouts import Parts, half, half_bytes, planes, unplanes
from bitfold.formats.families.ggml_points import points


@dataclass(frozen=True)
class Codes:
    """b blocks of 256 weights taken apart.

    Args:
        points: int64 (b, 32) or (b, 64), the numbers of the points.
        signs: uint8 (b, 32), of eight weights each: a bit is set where the weight is negative, the first one lowest.
        scale: uint8 (b, s), 0..15, of 256 / s weights each.
        d: float32 (b, 1), a half-precision number.
    """

    points: Tensor
    signs: Tensor
    scale: Tensor
    d: Tensor


@dataclass(frozen=True)
class VectorType:
    """How a type makes numbers: d * unit * (2 * scale + 1) * magnitude, with a sign.

    Args:
        name: of the type, and of its points.
        parity: eight signs take 7 bits: the number of negative ones is even.
        sub: neighbouring weights that share a scale.
        unit: power of two.
        split: bytes (b, block bytes) -> codes.
        join: codes -> bytes.
    """

    name: str
    parity: bool
    sub: int
    unit: float
    split: Callable[[Tensor], Codes]
    join: Callable[[Codes], Tensor]

    @property
    def bits(self) -> Fraction:
        """Of points and signs, for each weight."""
        count, dims = points(self.name).shape
        return Fraction((count - 1).bit_length(), dims) + Fraction(7 if self.parity else 8, 8)

    def parts(self, raw: Tensor) -> Parts:
        """Blocks taken apart into numbers and scales."""
        codes = self.split(raw)
        magnitudes = points(self.name).to(raw.device)[codes.points].view(len(raw), -1).float()
        sign = 1 - 2 * planes(codes.signs, 1, 1).float()
        scale = codes.d * (self.unit * (2 * codes.scale.float() + 1))
        return Parts((magnitudes * sign).view(len(raw), scale.shape[1], -1), scale[..., None])


def even_signs(seven: Tensor) -> Tensor:
    """uint8: 7 bits, with the eighth that makes the number of bits even."""
    x = seven.to(torch.uint8)
    folded = x ^ (x >> 4)
    folded = folded ^ (folded >> 2)
    return x | ((folded ^ (folded >> 1)) & 1) << 7


def _words(raw: Tensor) -> Tensor:
    """Bytes (b, 4 c) as int64 (b, c), little-endian."""
    four = raw.reshape(len(raw), -1, 4).long()
    return four[..., 0] | four[..., 1] << 8 | four[..., 2] << 16 | four[..., 3] << 24


def _word_bytes(words: Tensor) -> Tensor:
    """Inverse of `_words`."""
    return torch.stack([words >> shift & 255 for shift in (0, 8, 16, 24)], -1).to(torch.uint8).flatten(1)


def _signed_word(words: Tensor) -> tuple[Tensor, Tensor]:
    """Four times 7 bits of signs, and 4 bits of scale: signs (b, 4 c) and scale (b, c) of words (b, c)."""
    seven = torch.stack([words >> shift & 127 for shift in (0, 7, 14, 21)], -1).flatten(1)
    return even_signs(seven), (words >> 28).to(torch.uint8)


def _signed_word_bytes(codes: Codes) -> Tensor:
    """Inverse of `_signed_word`: bytes (b, 32)."""
    seven = (codes.signs.long() & 127).view(len(codes.signs), -1, 4)
    words = sum(seven[..., i] << 7 * i for i in range(4)) | codes.scale.long() << 28
    return _word_bytes(words)


def _split_iq2_xxs(raw: Tensor) -> Codes:
    """d; for each 32 weights 4 bytes of points and a word of signs and scale."""
    runs = raw[:, 2:].reshape(len(raw), 8, 8)
    signs, scale = _signed_word(_words(runs[..., 4:].flatten(1)))
    return Codes(runs[..., :4].flatten(1).long(), signs, scale, half(raw[:, :2]))


def _join_iq2_xxs(codes: Codes) -> Tensor:
    b = len(codes.d)
    runs = torch.cat([codes.points.to(torch.uint8).view(b, 8, 4), _signed_word_bytes(codes).view(b, 8, 4)], 2)
    return torch.cat([half_bytes(codes.d), runs.flatten(1)], 1)


def _split_iq2_xs(raw: Tensor) -> Codes:
    """d; 32 numbers of 16 bits: a point, and 7 signs above; 8 bytes of two scales each."""
    pairs = raw[:, 2:66].reshape(len(raw), 32, 2).long()
    whole = pairs[..., 0] | pairs[..., 1] << 8
    return Codes(whole & 511, even_signs(whole >> 9), planes(raw[:, 66:], 1, 4), half(raw[:, :2]))


def _join_iq2_xs(codes: Codes) -> Tensor:
    whole = codes.points | (codes.signs.long() & 127) << 9
    both = torch.stack([whole & 255, whole >> 8], -1).to(torch.uint8).flatten(1)
    return torch.cat([half_bytes(codes.d), both, unplanes(codes.scale, 1, 4)], 1)


def _split_iq2_s(raw: Tensor) -> Codes:
    """d; 32 bytes of points, 32 of signs, 8 of the high two bits of points, 8 of two scales each."""
    index = raw[:, 2:34].long() | planes(raw[:, 66:74], 1, 2).long() << 8
    return Codes(index, raw[:, 34:66], planes(raw[:, 74:], 1, 4), half(raw[:, :2]))


def _join_iq2_s(codes: Codes) -> Tensor:
    low = (codes.points & 255).to(torch.uint8)
    ends = [unplanes(codes.points >> 8, 1, 2), unplanes(codes.scale, 1, 4)]
    return torch.cat([half_bytes(codes.d), low, codes.signs, *ends], 1)


def _split_iq3_xxs(raw: Tensor) -> Codes:
    """d; 64 bytes of points of four; for each 32 weights a word of signs and scale."""
    signs, scale = _signed_word(_words(raw[:, 66:]))
    return Codes(raw[:, 2:66].long(), signs, scale, half(raw[:, :2]))


def _join_iq3_xxs(codes: Codes) -> Tensor:
    return torch.cat([half_bytes(codes.d), codes.points.to(torch.uint8), _signed_word_bytes(codes)], 1)


def _split_iq3_s(raw: Tensor) -> Codes:
    """d; 64 bytes of points of four, 8 of their ninth bits, 32 of signs, 4 of two scales each."""
    index = raw[:, 2:66].long() | planes(raw[:, 66:74], 1, 1).long() << 8
    return Codes(index, raw[:, 74:106], planes(raw[:, 106:], 1, 4), half(raw[:, :2]))


def _join_iq3_s(codes: Codes) -> Tensor:
    low = (codes.points & 255).to(torch.uint8)
    body = [unplanes(codes.points >> 8, 1, 1), codes.signs, unplanes(codes.scale, 1, 4)]
    return torch.cat([half_bytes(codes.d), low, *body], 1)


VECTORS: dict[str, VectorType] = {
    "iq2_xxs": VectorType("iq2_xxs", True, 32, 0.125, _split_iq2_xxs, _join_iq2_xxs),
    "iq2_xs": VectorType("iq2_xs", True, 16, 0.125, _split_iq2_xs, _join_iq2_xs),
    "iq2_s": VectorType("iq2_s", False, 16, 0.125, _split_iq2_s, _join_iq2_s),
    "iq3_xxs": VectorType("iq3_xxs", True, 32, 0.25, _split_iq3_xxs, _join_iq3_xxs),
    "iq3_s": VectorType("iq3_s", False, 32, 1.0, _split_iq3_s, _join_iq3_s),
}

# IQ1: points of -1, 0 and 1, all eight moved by an eighth to one side or the other.


def _moved(index: Tensor, down: Tensor, scale: Tensor) -> Parts:
    """index int64 (b, 32), down (b, 32): to the negative side; scale float32 (b, s)."""
    move = torch.where(down, -0.125, 0.125)[..., None]
    codes = points("iq1_s").to(index.device)[index].float() + move
    return Parts(codes.view(len(index), scale.shape[1], -1), scale[..., None])


def split_iq1_s(raw: Tensor) -> Parts:
    """d; 32 bytes of points; for each 32 weights four times 3 more bits of points, 3 bits of scale, the side."""
    pairs = raw[:, 34:].reshape(len(raw), 8, 2).long()
    high = pairs[..., 0] | pairs[..., 1] << 8
    more = torch.stack([high >> shift & 7 for shift in (0, 3, 6, 9)], -1).flatten(1)
    down = (high >> 15 != 0).repeat_interleave(4, 1)
    scale = half(raw[:, :2]) * (2 * (high >> 12 & 7) + 1).float()
    return _moved(raw[:, 2:34].long() | more << 8, down, scale)


def split_iq1_m(raw: Tensor) -> Parts:
    """32 bytes of points; 16 bytes of nibbles: 3 more bits and the side; four words of 16 bits: four scales of 3 bits
    each, and on top a nibble of d."""
    nibbles = planes(raw[:, 32:48], 1, 4).long()
    pairs = raw[:, 48:].reshape(len(raw), 4, 2).long()
    words = pairs[..., 0] | pairs[..., 1] << 8
    d = half(torch.stack([words[:, i] >> 12 | words[:, i + 1] >> 12 << 4 for i in (0, 2)], 1).to(torch.uint8))
    steps = torch.stack([words >> shift & 7 for shift in (0, 3, 6, 9)], -1).flatten(1)
    return _moved(raw[:, :32].long() | (nibbles & 7) << 8, nibbles & 8 != 0, d * (2 * steps + 1).float())
