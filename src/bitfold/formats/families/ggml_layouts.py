"""Byte layouts of ggml's blocks: bytes -> (codes, scale, shift) and back, for each type.

A ggml block is a run of 32 or 256 consecutive weights of a row together with its scales. Whatever the type, a weight is
`scale * code + shift`, in float32 with two roundings (no fused multiply-add: the reference has none). So a layout is
`split`, which takes bytes apart, and for the types that can be written `join`, which puts them together again.
Layout of each type: https://github.com/ggml-org/ggml (ggml-common.h, block_* structures).

Codes and scales do not lie in order: a byte holds the k-th bits of weights that are 16, 32 or 64 apart, so that SIMD
code gets neighbours with one shift. `planes` is that one pattern; everything else is columns of bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitfold.errors import FormatError

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@dataclass(frozen=True)
class Parts:
    """b blocks taken apart into s sub-blocks of g weights.

    Args:
        codes: float32 (b, s, g), the value of each code before scaling.
        scale: float32 (b, s, 1).
        shift: float32 (b, s, 1) or None for zero.
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor | None = None


def planes(raw: Tensor, group: int, bits: int) -> Tensor:
    """uint8 (b, bytes) -> uint8 (b, bytes * 8 / bits): of each run of `group` bytes the lowest bits, then the next."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=raw.device)[:, None]
    runs = raw.reshape(raw.shape[0], -1, 1, group)
    return ((runs >> shifts) & ((1 << bits) - 1)).reshape(raw.shape[0], -1)


def unplanes(codes: Tensor, group: int, bits: int) -> Tensor:
    """Inverse of `planes`; codes (b, n), any integer type, below 2**bits."""
    shifts = torch.arange(0, 8, bits, dtype=torch.int32)[:, None]
    runs = codes.to(torch.int32).reshape(codes.shape[0], -1, 8 // bits, group)
    return (runs << shifts).sum(2).to(torch.uint8).reshape(codes.shape[0], -1)


def half(raw: Tensor) -> Tensor:
    """Two bytes (b, 2), an IEEE half in little-endian order -> float32 (b, 1)."""
    return raw.contiguous().view(torch.float16).float()


def half_bytes(x: Tensor) -> Tensor:
    """float32 (b, 1) -> the two bytes (b, 2) of its rounding to half.

    Raises:
        FormatError: a number beyond the range of half precision.
    """
    rounded = x.to(torch.float16)
    if not torch.isfinite(rounded).all():
        raise FormatError("a block's scale exceeds the range of half precision, 65504", hint="scale the weights down")
    return rounded.contiguous().view(torch.uint8)


def signed(raw: Tensor) -> Tensor:
    """uint8 bytes read as int8."""
    return raw.contiguous().view(torch.int8)


def _one(codes: Tensor, scale: Tensor, shift: Tensor | None = None) -> Parts:
    """Parts of blocks that have one scale: (b, g), (b, 1), (b, 1)."""
    return Parts(codes.float()[:, None], scale[:, None], None if shift is None else shift[:, None])


# Blocks of 32 weights with one half-precision scale d (and minimum m).


def split_q4_0(raw: Tensor) -> Parts:
    """d, 16 bytes of nibbles; codes are centred on 8."""
    return _one(planes(raw[:, 2:], 16, 4).float() - 8, half(raw[:, :2]))


def split_q4_1(raw: Tensor) -> Parts:
    """d, m, 16 bytes of nibbles."""
    return _one(planes(raw[:, 4:], 16, 4), half(raw[:, :2]), half(raw[:, 2:4]))


def _five_bits(raw: Tensor) -> Tensor:
    """4 bytes of fifth bits in order, then 16 bytes of nibbles."""
    return planes(raw[:, 4:], 16, 4) | (planes(raw[:, :4], 1, 1) << 4)


def split_q5_0(raw: Tensor) -> Parts:
    """d, fifth bits, nibbles; codes are centred on 16."""
    return _one(_five_bits(raw[:, 2:]).float() - 16, half(raw[:, :2]))


def split_q5_1(raw: Tensor) -> Parts:
    """d, m, fifth bits, nibbles."""
    return _one(_five_bits(raw[:, 4:]), half(raw[:, :2]), half(raw[:, 2:4]))


def split_q8_0(raw: Tensor) -> Parts:
    """d, 32 signed bytes."""
    return _one(signed(raw[:, 2:]), half(raw[:, :2]))


def join_legacy(codes: Tensor, halves: list[Tensor], bits: int) -> Tensor:
    """Bytes of the 32-weight types: codes (b, 32) in 0..2**bits-1, halves = [d] or [d, m] as float32 (b, 1)."""
    low = codes & 15 if bits == 5 else codes
    high = [unplanes(codes >> 4, 1, 1)] if bits == 5 else []
    body = codes.to(torch.uint8) if bits == 8 else unplanes(low, 16, 4)
    return torch.cat([half_bytes(h) for h in halves] + high + [body], dim=1)


# K-quants: 256 weights, sub-blocks of 16 or 32 whose scales are themselves integers times a half-precision d.


def split_q2_k(raw: Tensor) -> Parts:
    """16 bytes of (scale, minimum) nibbles, 64 bytes of 2-bit codes, d, dmin."""
    d, dmin = half(raw[:, 80:82]), half(raw[:, 82:84])
    codes = planes(raw[:, 16:80], 32, 2).float().view(-1, 16, 16)
    scale, low = d * (raw[:, :16] & 15).float(), dmin * (raw[:, :16] >> 4).float()
    return Parts(codes, scale[..., None], -low[..., None])


def split_q3_k(raw: Tensor) -> Parts:
    """32 bytes of third bits (set = no offset of 4), 64 bytes of 2-bit codes, 12 bytes of 6-bit scales, d."""
    high = planes(raw[:, :32], 32, 1).float()
    codes = (planes(raw[:, 32:96], 32, 2).float() - 4 * (1 - high)).view(-1, 16, 16)
    scales = planes(raw[:, 96:104], 8, 4) | (planes(raw[:, 104:108], 4, 2) << 4)
    return Parts(codes, (half(raw[:, 108:110]) * (scales.float() - 32))[..., None])


def split_six_bit_pairs(raw: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes -> 8 scales and 8 minima of 6 bits: the first four in the low bits of bytes 0-3 and 4-7, the last four
    as nibbles of bytes 8-11 with their two high bits on top of bytes 0-3 and 4-7."""
    a, b, c = raw[:, :4], raw[:, 4:8], raw[:, 8:12]
    scale = torch.cat([a & 63, (c & 15) | (a >> 6 << 4)], dim=1)
    low = torch.cat([b & 63, (c >> 4) | (b >> 6 << 4)], dim=1)
    return scale, low


def join_six_bit_pairs(scale: Tensor, low: Tensor) -> Tensor:
    """Inverse of `split_six_bit_pairs`: int (b, 8) twice -> uint8 (b, 12)."""
    a = scale[:, :4] | (scale[:, 4:] >> 4 << 6)
    b = low[:, :4] | (low[:, 4:] >> 4 << 6)
    c = (scale[:, 4:] & 15) | ((low[:, 4:] & 15) << 4)
    return torch.cat([a, b, c], dim=1).to(torch.uint8)


def _k_affine(raw: Tensor, codes: Tensor) -> Parts:
    scale, low = split_six_bit_pairs(raw[:, 4:16])
    d, dmin = half(raw[:, :2]), half(raw[:, 2:4])
    return Parts(codes.float().view(-1, 8, 32), (d * scale.float())[..., None], -(dmin * low.float())[..., None])


def split_q4_k(raw: Tensor) -> Parts:
    """d, dmin, 12 bytes of scales and minima, 128 bytes of nibbles."""
    return _k_affine(raw, planes(raw[:, 16:], 32, 4))


def split_q5_k(raw: Tensor) -> Parts:
    """d, dmin, 12 bytes of scales and minima, 32 bytes of fifth bits, 128 bytes of nibbles."""
    return _k_affine(raw, planes(raw[:, 48:], 32, 4) | (planes(raw[:, 16:48], 32, 1) << 4))


def split_q6_k(raw: Tensor) -> Parts:
    """128 bytes of low nibbles, 64 bytes of high bit pairs, 16 signed byte scales, d; codes are centred on 32."""
    codes = planes(raw[:, :128], 64, 4) | (planes(raw[:, 128:192], 32, 2) << 4)
    scale = half(raw[:, 208:210]) * signed(raw[:, 192:208]).float()
    return Parts((codes.float() - 32).view(-1, 16, 16), scale[..., None])


def join_q2_k(codes: Tensor, scale: Tensor, low: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
    """codes (b, 256), scale and low (b, 16), d and dmin (b, 1) -> bytes (b, 84)."""
    return torch.cat([(scale | low << 4).to(torch.uint8), unplanes(codes, 32, 2), half_bytes(d), half_bytes(dmin)], 1)


def join_q4_k(codes: Tensor, scale: Tensor, low: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
    """codes (b, 256), scale and low (b, 8), d and dmin (b, 1) -> bytes (b, 144)."""
    head = [half_bytes(d), half_bytes(dmin), join_six_bit_pairs(scale, low)]
    return torch.cat([*head, unplanes(codes, 32, 4)], 1)


def join_q5_k(codes: Tensor, scale: Tensor, low: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
    """codes (b, 256), scale and low (b, 8), d and dmin (b, 1) -> bytes (b, 176)."""
    head = [half_bytes(d), half_bytes(dmin), join_six_bit_pairs(scale, low)]
    return torch.cat([*head, unplanes(codes >> 4, 32, 1), unplanes(codes & 15, 32, 4)], 1)


def join_q3_k(codes: Tensor, scale: Tensor, d: Tensor) -> Tensor:
    """codes (b, 256) in 0..7 and scale (b, 16) in 0..63, both with their offsets added, d (b, 1) -> bytes (b, 110)."""
    scales = [unplanes(scale & 15, 8, 4), unplanes(scale >> 4, 4, 2)]
    return torch.cat([unplanes(codes >> 2, 32, 1), unplanes(codes & 3, 32, 2), *scales, half_bytes(d)], 1)


def join_q6_k(codes: Tensor, scale: Tensor, d: Tensor) -> Tensor:
    """codes (b, 256) in 0..63, scale (b, 16) in -128..127, d (b, 1) -> bytes (b, 210)."""
    body = [unplanes(codes & 15, 64, 4), unplanes(codes >> 4, 32, 2)]
    return torch.cat([*body, scale.to(torch.int8).view(torch.uint8), half_bytes(d)], 1)


# Value tables and ternary types.


def _lookup(codes: Tensor, values: tuple[int, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).to(codes.device)[codes.long()]


def split_iq4_nl(raw: Tensor) -> Parts:
    """d, 16 bytes of nibbles that index IQ4_VALUES."""
    return _one(_lookup(planes(raw[:, 2:], 16, 4), IQ4_VALUES), half(raw[:, :2]))


def split_iq4_xs(raw: Tensor) -> Parts:
    """d, 2 bytes of high scale bits, 4 bytes of low scale nibbles, 128 bytes of nibbles that index IQ4_VALUES."""
    scales = planes(raw[:, 4:8], 1, 4) | (planes(raw[:, 2:4], 1, 2) << 4)
    codes = _lookup(planes(raw[:, 8:], 16, 4), IQ4_VALUES).view(-1, 8, 32)
    return Parts(codes, (half(raw[:, :2]) * (scales.float() - 32))[..., None])


def join_iq4_xs(codes: Tensor, scale: Tensor, d: Tensor) -> Tensor:
    """codes (b, 256) in 0..15, scale (b, 8) in 0..63, its offset added, d (b, 1) -> bytes (b, 136)."""
    scales = [unplanes(scale >> 4, 1, 2), unplanes(scale & 15, 1, 4)]
    return torch.cat([half_bytes(d), *scales, unplanes(codes, 16, 4)], 1)


def e8m0_half(e: Tensor) -> Tensor:
    """Half of the power of two that an E8M0 byte stands for: 2**(e - 128), float32, exact (subnormal for e < 2)."""
    e = e.to(torch.int32)
    return torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1) << 23).view(torch.float32)


def split_mxfp4(raw: Tensor) -> Parts:
    """E8M0 scale, 16 bytes of e2m1 nibbles (values doubled to stay integers, hence half the scale)."""
    return _one(_lookup(planes(raw[:, 1:], 16, 4), E2M1_DOUBLED), e8m0_half(raw[:, :1]))


def split_tq2_0(raw: Tensor) -> Parts:
    """64 bytes of 2-bit codes centred on 1, d."""
    return _one(planes(raw[:, :64], 32, 2).float() - 1, half(raw[:, 64:66]))


def _trits(raw: Tensor, group: int, count: int) -> Tensor:
    """The `count` leading base-3 digits of bytes that hold a fraction of 256; runs of `group` bytes as in `planes`."""
    powers = torch.tensor([3**i for i in range(count)], dtype=torch.int32).to(raw.device)[:, None]
    shifted = (raw.to(torch.int32).reshape(raw.shape[0], -1, 1, group) * powers) & 255
    return (shifted * 3 >> 8).reshape(raw.shape[0], -1)


def split_tq1_0(raw: Tensor) -> Parts:
    """32 + 16 bytes of five trits each, 4 bytes of four trits, d; digits 0, 1, 2 are -1, 0, 1."""
    digits = [_trits(raw[:, :32], 32, 5), _trits(raw[:, 32:48], 16, 5), _trits(raw[:, 48:52], 4, 4)]
    return _one(torch.cat(digits, 1).float() - 1, half(raw[:, 52:54]))
