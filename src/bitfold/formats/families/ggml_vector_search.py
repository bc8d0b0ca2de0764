"""The nearest vector of ggml's vector types: points and signs that cost least, and the scales that suit them.

What an error e of eight neighbouring weights costs is e M e^T. With the signs given, the cost is a linear function of
the magnitudes and their products, so that one product of matrices compares all points. Signs are those of the weights;
where the number of negative ones must be even and is not, the one that is cheapest to be wrong about is turned. A
second choice of signs may be tried.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from bitfold.formats.families.ggml_points import points
from bitfold.formats.families.ggml_scales import as_half
from bitfold.formats.families.ggml_vectors import VectorType

GROUP = 8  # weights whose signs lie together
_AT_ONCE = 1 << 18  # costs of points in memory
_LADDER = tuple(
    0.5 + 0.07 * i for i in range(10)
)  # largest weight over largest magnitude, of the scales that are tried
_LARGEST = 31  # 2 * scale code + 1


@dataclass(frozen=True)
class Found:
    """What stands for groups of eight weights.

    Args:
        points: int64 (..., 1 or 2).
        negative: bool (..., 8).
        values: float32 (..., 8), magnitudes with signs.
    """

    points: Tensor
    negative: Tensor
    values: Tensor


def nearest(type: VectorType, x: Tensor, metric: Tensor, *, tries: int = 2) -> Found:
    """The vectors nearest to x under a metric: found by trying, not proven to be the nearest.

    Args:
        type: whose points.
        x: float32 (b, n, 8), in units of the scale.
        metric: float32 (b, 8), what the square of each error costs; or (b, 8, 8), symmetric, positive definite.
        tries: choices of signs, 1 or 2.
    """
    step = max(1, _AT_ONCE // (len(x) * len(points(type.name))))
    parts = [_nearest(type, x[:, at : at + step], metric, tries) for at in range(0, x.shape[1], step)]
    return Found(*(torch.cat([getattr(part, name) for part in parts], 1) for name in ("points", "negative", "values")))


def _nearest(type: VectorType, x: Tensor, metric: Tensor, tries: int) -> Found:
    weight = metric if metric.dim() == 2 else metric.diagonal(dim1=1, dim2=2)
    negative = x < 0
    cheap = (x.abs() * weight[:, None]).topk(2, dim=2, largest=False).indices
    first, both = torch.zeros_like(negative), torch.zeros_like(negative)
    first.scatter_(2, cheap[..., :1], True)
    both.scatter_(2, cheap, True)
    if type.parity:
        negative = negative ^ (first & (negative.sum(2, keepdim=True) % 2 == 1))
    one, cost = _points_for(type, x, negative, metric)
    if tries == 1:
        return one
    two, other = _points_for(type, x, negative ^ (both if type.parity else first), metric)
    better = (other < cost)[..., None]
    pairs = ((one.points, two.points), (one.negative, two.negative), (one.values, two.values))
    return Found(*(torch.where(better, b, a) for a, b in pairs))


def _points_for(type: VectorType, x: Tensor, negative: Tensor, metric: Tensor) -> tuple[Found, Tensor]:
    """The best points under given signs, and the costs (b, n): those of errors of eight weights."""
    table = points(type.name).float()
    dims = table.shape[1]
    sign = 1 - 2 * negative.float()
    if dims == GROUP or metric.dim() == 2:
        halves = [slice(at, at + dims) for at in range(0, GROUP, dims)]
        squares = [metric[:, h] if metric.dim() == 2 else metric for h in halves]
        found = [_best(table, x[..., h], sign[..., h], m) for h, m in zip(halves, squares, strict=True)]
    else:  # the second half makes up for what the first leaves, as far as it can
        a, b, across = metric[:, :dims, :dims], metric[:, dims:, dims:], metric[:, :dims, dims:]
        share = torch.linalg.solve(b, across.mT)  # (b, 4, 4)
        left = _best(table, x[..., :dims], sign[..., :dims], a - across @ share)
        error = x[..., :dims] - table[left] * sign[..., :dims]
        found = [left, _best(table, x[..., dims:] + error @ share.mT, sign[..., dims:], b)]
    values = torch.cat([table[i] for i in found], 2) * sign
    error = x - values
    turned = error * metric[:, None] if metric.dim() == 2 else error @ metric
    return Found(torch.stack(found, 2), negative, values), (turned * error).sum(2)


def _best(table: Tensor, x: Tensor, sign: Tensor, metric: Tensor) -> Tensor:
    """int64 (b, n): the row of the table (p, d) whose magnitudes, with these signs, cost least."""
    if metric.dim() == 2:
        own, pull = metric, metric[:, None] * x
        features, known = [-2 * pull * sign], [table.T.expand(len(x), -1, -1)]
    else:
        own, pull = metric.diagonal(dim1=1, dim2=2), x @ metric
        i, j = torch.tensor(list(itertools.combinations(range(table.shape[1]), 2))).T
        features = [-2 * pull * sign, sign[..., i] * sign[..., j]]
        products = 2 * metric[:, i, j, None] * (table[:, i] * table[:, j]).T
        known = [table.T.expand(len(x), -1, -1), products]
    squares = own @ (table * table).T
    return (
        torch.baddbmm(squares[:, None], torch.cat(features, 2), torch.cat(known, 1)).min(2).indices
    )  # argmin takes twice as long


def fit(type: VectorType, w: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scales of a weight: codes uint8 (n, k / sub) and d float32 (n, k / 256), half-precision numbers.

    For each sub-block the scale that costs least of some; then the common factor, and of its multiples that one of the
    three around the wanted that costs least.

    Args:
        type: of the numbers.
        w: float32 (n, k).
        importance: float32 (k,) of the inputs, or None.
    """
    n, k = w.shape
    sub = type.sub
    weight = torch.ones(k) if importance is None else importance
    weight = weight + 1e-3 * weight.mean() + 1e-30
    weight = (weight / weight.mean()).view(-1, GROUP)
    x = w.view(n, -1, GROUP).transpose(0, 1).contiguous()  # (groups, n, 8)

    def trial(scale: Tensor) -> tuple[Tensor, Tensor]:
        """What codes under scales (n, k / sub) have in common with w, and their squares, (n, k / sub) each."""
        inverse = torch.where(scale > 0, 1 / scale, 0.0).T.repeat_interleave(sub // GROUP, 0)
        values = nearest(type, x * inverse[..., None], weight, tries=1).values
        weighted = values * weight[:, None]
        sums = ((weighted * y).sum(2).view(-1, sub // GROUP, n).sum(1).T for y in (x, values))
        top, bottom = sums
        return top, bottom

    largest = w.view(n, -1, sub).abs().amax(2) / float(points(type.name).max())
    best, gain = torch.zeros_like(largest), torch.zeros_like(largest)
    for step in _LADDER:
        top, bottom = trial(largest * step)
        found = top * top / bottom
        better = found > gain
        best, gain = torch.where(better, top / bottom, best), torch.where(better, found, gain)
    d = _factor(best.view(n, k // 256, -1), gain.view(n, k // 256, -1), type.unit)
    unit = (d * type.unit).repeat_interleave(256 // sub, 1)
    wanted = ((best * torch.where(unit > 0, 1 / unit, 0.0) - 1) / 2).round()
    codes, least = torch.zeros_like(wanted), torch.full_like(wanted, torch.inf)
    for step in (0, -1, 1):
        some = (wanted + step).clamp(0, 15)
        scale = unit * (2 * some + 1)
        top, bottom = trial(scale)
        cost = scale * (scale * bottom - 2 * top)
        codes = torch.where(cost < least, some, codes)
        least = torch.minimum(cost, least)
    return codes.to(torch.uint8), d


def _factor(scale: Tensor, gain: Tensor, unit: float) -> Tensor:
    """float32 (n, b): the number whose odd multiples up to 31 come nearest to scales (n, b, s), as half precision.

    An error of a scale costs what it is of the scale, squared, times `gain`.
    """
    top = scale.amax(2)
    weight = gain / scale.square().clamp_min(1e-30)
    best, least = torch.zeros_like(top), torch.full_like(top, torch.inf)
    for most in range(_LARGEST - 8, _LARGEST + 3):
        d = as_half(top / (unit * most))
        inverse = torch.where(d > 0, 1 / (d * unit), 0.0)[..., None]
        odd = 2 * ((scale * inverse - 1) / 2).round().clamp(0, 15) + 1
        cost = (weight * (scale - odd * (d * unit)[..., None]).square()).sum(2)
        best, least = torch.where(cost < least, d, best), torch.minimum(cost, least)
    return best
