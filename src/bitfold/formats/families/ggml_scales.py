"""Which scales the blocks of ggml's types get: least squares over candidates, each weight as important as its input.

A scale is tried at many places around the one that fits the extremes; for each the nearest codes are taken, and for
those the scale that costs least has a closed form (as in llama.cpp's searches). Types with two levels of scales choose
those of the sub-blocks first, and then by the same search the common factor and the small integers that stand for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bitfold.formats.families import ggml_layouts as L

_STEPS = 10  # candidates on each side of the scale of the extremes
_STEP = 0.1  # of a level
_OTHER_END = (0.0, 0.3, 0.6)  # levels inside the other end: grids have one more level below zero than above


@dataclass(frozen=True)
class Scales:
    """The scales of b blocks with s sub-blocks: a weight is scale * value + shift.

    Args:
        d: float32 (b, 1), a half-precision number.
        low: float32 (b, 1), the minimum or its factor, a half-precision number; None: there is none.
        scale_codes: float32 (b, s) whole numbers, factors of d; None: d is the scale.
        low_codes: float32 (b, s), factors of -low; None: low is the shift.
    """

    d: Tensor
    low: Tensor | None = None
    scale_codes: Tensor | None = None
    low_codes: Tensor | None = None

    @property
    def scale(self) -> Tensor:
        """float32 (b, s)."""
        return self.d if self.scale_codes is None else self.d * self.scale_codes

    @property
    def shift(self) -> Tensor | None:
        """float32 (b, s)."""
        if self.low is None or self.low_codes is None:
            return self.low
        return -(self.low * self.low_codes)


def joined(parts: list[Scales]) -> Scales:
    """Those of several runs of blocks as one."""
    d, low, scale_codes, low_codes = (
        [found for part in parts if (found := getattr(part, name)) is not None]
        for name in ("d", "low", "scale_codes", "low_codes")
    )
    more = (torch.cat(found) if found else None for found in (low, scale_codes, low_codes))
    return Scales(torch.cat(d), *more)


@dataclass(frozen=True)
class Structure:
    """How a type makes numbers.

    Args:
        sub: neighbouring weights that share a scale.
        points: the value of each code, ascending.
        affine: there are minima; codes count from 0.
        top: the largest scale code; None: a block has one scale, in half precision.
        join: codes int32 (b, block), counted from 0, and scales -> bytes.
    """

    sub: int
    points: tuple[int, ...]
    affine: bool
    top: int | None
    join: Callable[[Tensor, Scales], Tensor]

    @property
    def even(self) -> bool:
        """Whether the values are consecutive integers."""
        return self.points[-1] - self.points[0] == len(self.points) - 1

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Scales:
        """Scales of blocks w, float32 (b, block), each weight with its importance, the same shape or broadcast."""
        sub = w.view(len(w), -1, self.sub)
        weight = torch.ones_like(sub) if importance is None else importance.expand_as(w).reshape(sub.shape)
        # Inputs that are always zero say nothing: their weights count a little, so that no block is without a scale.
        weight = weight + 1e-3 * weight.mean((1, 2), keepdim=True) + 1e-30
        weight = weight / weight.mean((1, 2), keepdim=True)
        if self.affine:
            return self._affine(sub, weight)
        scale = _centred(sub, weight, self.points)
        if self.top is None:
            return Scales(as_half(scale))
        whole = tuple(range(-self.top, self.top))
        d = as_half(_centred(scale[:, None], weight.sum(2)[:, None], whole))
        codes = (scale * _inverse(d)).round().clamp(-self.top, self.top - 1)
        return Scales(d, None, codes)

    def _affine(self, sub: Tensor, weight: Tensor) -> Scales:
        last = self.points[-1]
        scale, shift = _from_below(sub, weight, last, free=self.top is None)
        if self.top is None:
            return Scales(as_half(scale), as_half(shift))
        whole = weight.sum(2)
        d, low = (as_half(_from_zero(x, whole, self.top)) for x in (scale, -shift))
        codes = ((x * _inverse(y)).round().clamp(0, self.top) for x, y in ((scale, d), (-shift, low)))
        return Scales(d, low, *codes)

    def codes(self, w: Tensor, scales: Scales) -> Tensor:
        """The nearest codes, int32 (b, block), counted from 0."""
        sub = w.view(len(w), -1, self.sub)
        shift = scales.shift
        lifted = sub if shift is None else sub - shift[..., None]
        return nearest(lifted * _inverse(scales.scale)[..., None], self.points).flatten(1).to(torch.int32)

    def write(self, w: Tensor, importance: Tensor | None = None) -> Tensor:
        """Bytes of blocks w, float32 (b, block)."""
        scales = self.fit(w, importance)
        return self.join(self.codes(w, scales), scales)


def nearest(x: Tensor, points: tuple[int, ...]) -> Tensor:
    """The number of the nearest point of each x."""
    if points[-1] - points[0] == len(points) - 1:
        return x.round().clamp_(points[0], points[-1]).sub_(points[0])
    return _nearest_of(points)[_halves(x, points)]


def _values(x: Tensor, points: tuple[int, ...]) -> Tensor:
    if points[-1] - points[0] == len(points) - 1:
        return x.round().clamp_(points[0], points[-1])
    return torch.tensor(points, dtype=torch.float32)[_nearest_of(points)][_halves(x, points)]


def _halves(x: Tensor, points: tuple[int, ...]) -> Tensor:
    """The half step above the lowest point in which each x lies: what is nearest changes only between these."""
    return x.mul(2).floor_().clamp_(2 * points[0], 2 * points[-1]).sub_(2 * points[0]).to(torch.int32)


@lru_cache
def _nearest_of(points: tuple[int, ...]) -> Tensor:
    """The number of the nearest point, int64, by half steps."""
    values = torch.tensor(points, dtype=torch.float32)
    middles = torch.arange(2 * points[0], 2 * points[-1] + 1, dtype=torch.float32) / 2 + 0.25
    return torch.bucketize(middles, (values[1:] + values[:-1]) / 2)


def as_half(x: Tensor) -> Tensor:
    """As half precision stores it; numbers beyond its range stay, and are refused when they are written."""
    rounded = x.to(torch.float16).float()
    return torch.where(torch.isfinite(rounded), rounded, x)


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where that is no number."""
    inverse = 1 / x
    return torch.where(torch.isfinite(inverse), inverse, 0.0)


def _centred(x: Tensor, weight: Tensor, points: tuple[int, ...]) -> Tensor:
    """float32 (b, s): scales of x (b, s, g) on values on both sides of zero."""
    unit = (points[-1] - points[0]) / (len(points) - 1)
    extreme = _inverse(x.gather(2, x.abs().argmax(2, keepdim=True)))
    ends = [points[0] + _STEP * unit * i for i in range(-_STEPS // 2, _STEPS)]
    ends += [points[-1] - unit * i for i in _OTHER_END]
    best = torch.zeros_like(x[..., 0])
    gain = torch.zeros_like(best)
    weighted = x * weight
    for end in ends:
        values = _values(x * (extreme * end), points)
        top, bottom = (weighted * values).sum(2), (weight * values * values).sum(2)
        found = top * top * _inverse(bottom)
        better = found > gain
        gain = torch.where(better, found, gain)
        best = torch.where(better, top * _inverse(bottom), best)
    return best


def _from_below(x: Tensor, weight: Tensor, last: int, *, free: bool) -> tuple[Tensor, Tensor]:
    """Scale and shift, float32 (b, s) each, of x (b, s, g) on 0 .. last; a shift that is not free is not above zero."""
    low, high = x.amin(2, keepdim=True), x.amax(2, keepdim=True)
    low = low if free else low.clamp(max=0)
    span = _inverse(high - low)
    lifted, w1, wx = x - low, weight.sum(2), (weight * x).sum(2)
    scale, shift = torch.zeros_like(w1), low[..., 0].clone()
    gain = shift * (2 * wx - shift * w1)
    for i in range(-_STEPS, _STEPS):
        q = (lifted * (span * (last + _STEP * i))).round().clamp_(0, last)
        wq = weight * q
        s1, s2, sx = wq.sum(2), (wq * q).sum(2), (wq * x).sum(2)
        by = _inverse(s2 * w1 - s1 * s1)
        a, b = (sx * w1 - wx * s1) * by, (wx * s2 - sx * s1) * by
        if not free:
            b, a = b.clamp(max=0), torch.where(b > 0, sx * _inverse(s2), a)
        found = 2 * (a * sx + b * wx) - a * a * s2 - 2 * a * b * s1 - b * b * w1
        better = (found > gain) & (a > 0)
        gain, scale, shift = (torch.where(better, new, old) for new, old in ((found, gain), (a, scale), (b, shift)))
    return scale, shift


def _from_zero(x: Tensor, weight: Tensor, top: int) -> Tensor:
    """float32 (b, 1): the factor d with which d * (0 .. top) comes nearest to x (b, s), none below zero."""
    most = _inverse(x.amax(1, keepdim=True))
    best = torch.zeros_like(most)
    gain = torch.zeros_like(most)
    for i in range(-4, 9):
        q = (x * (most * (top + _STEP * 2 * i))).round().clamp_(0, top)
        up, down = (weight * x * q).sum(1, keepdim=True), (weight * q * q).sum(1, keepdim=True)
        found = up * up * _inverse(down)
        better = found > gain
        gain, best = torch.where(better, found, gain), torch.where(better, up * _inverse(down), best)
    return best


def _legacy(bits: int) -> Callable[[Tensor, Scales], Tensor]:
    def join(codes: Tensor, scales: Scales) -> Tensor:
        return L.join_legacy(codes, [scales.d] if scales.low is None else [scales.d, scales.low], bits)

    return join


def _join_q8_0(codes: Tensor, scales: Scales) -> Tensor:
    return L.join_legacy((codes - 127).to(torch.int8).view(torch.uint8), [scales.d], 8)


def _affine_k(join: Callable[..., Tensor]) -> Callable[[Tensor, Scales], Tensor]:
    def write(codes: Tensor, scales: Scales) -> Tensor:
        assert scales.scale_codes is not None
        assert scales.low_codes is not None
        whole = (scales.scale_codes.to(torch.int32), scales.low_codes.to(torch.int32))
        return join(codes, *whole, scales.d, scales.low)

    return write


def _symmetric_k(join: Callable[..., Tensor], offset: int) -> Callable[[Tensor, Scales], Tensor]:
    def write(codes: Tensor, scales: Scales) -> Tensor:
        assert scales.scale_codes is not None
        return join(codes, scales.scale_codes.to(torch.int32) + offset, scales.d)

    return write


def _whole(low: int, high: int) -> tuple[int, ...]:
    return tuple(range(low, high + 1))


STRUCTURES: dict[str, Structure] = {
    "q4_0": Structure(32, _whole(-8, 7), False, None, _legacy(4)),
    "q4_1": Structure(32, _whole(0, 15), True, None, _legacy(4)),
    "q5_0": Structure(32, _whole(-16, 15), False, None, _legacy(5)),
    "q5_1": Structure(32, _whole(0, 31), True, None, _legacy(5)),
    "q8_0": Structure(32, _whole(-127, 127), False, None, _join_q8_0),
    "q2_k": Structure(16, _whole(0, 3), True, 15, _affine_k(L.join_q2_k)),
    "q3_k": Structure(16, _whole(-4, 3), False, 32, _symmetric_k(L.join_q3_k, 32)),
    "q4_k": Structure(32, _whole(0, 15), True, 63, _affine_k(L.join_q4_k)),
    "q5_k": Structure(32, _whole(0, 31), True, 63, _affine_k(L.join_q5_k)),
    "q6_k": Structure(16, _whole(-32, 31), False, 128, _symmetric_k(L.join_q6_k, 0)),
    "iq4_nl": Structure(32, L.IQ4_VALUES, False, None, _legacy(4)),
    "iq4_xs": Structure(32, L.IQ4_VALUES, False, 32, _symmetric_k(L.join_iq4_xs, 32)),
}
