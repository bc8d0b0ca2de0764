"""Fits: which scales.

A fit looks at a weight (n, k) and a format and returns one real scale (and zero point) for each block. It does not
choose codes; it may try some. All arithmetic is float32 on blocks laid out as (down, across, elements).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from bitfold.errors import UsageError
from bitfold.formats import Fit, Format, Params
from bitfold.formats import integers as rounding

# Half-quadratic quantization: rounds, weight of the splitting and its growth, norm of the error.
_ROUNDS, _BETA, _GROWTH, _NORM = 20, 10.0, 1.01, 0.7


@dataclass
class BlockView:
    """A weight in blocks, with the weight of each element in the error (0 on padding)."""

    w: torch.Tensor
    importance: torch.Tensor | None
    format: Format

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """Weighted mean over the elements of each block."""
        if self.importance is None:
            return x.mean(-1)
        return (x * self.importance).sum(-1) / self.importance.sum(-1).clamp_min(1e-30)

    def points(self, params: Params) -> torch.Tensor:
        """Nearest grid points under params, zero point taken off: values are points * scale."""
        inverse = torch.where(params.scale == 0, 0.0, 1 / params.scale)
        scaled = self.w * inverse[..., None]
        if params.zero_point is None:
            return self.format.grid.nearest(scaled)
        zero = params.zero_point[..., None]
        return self.format.grid.nearest(scaled.add_(zero)).sub_(zero)

    def difference(self, params: Params) -> torch.Tensor:
        """Nearest values under params, less the weights."""
        return self.points(params).mul_(params.scale[..., None]).sub_(self.w)

    def error(self, params: Params) -> torch.Tensor:
        """Weighted mean square error of each block."""
        if self.importance is None and self.format.grid.uniform:
            if not rounding.available(self.w, params.scale, params.zero_point):
                return rounding.mean_square(self.difference(params))
            return rounding.block_errors(self.w, params.scale, params.zero_point, self.format.grid.span)
        return self.mean(self.difference(params).square_())

    def round_zero(self, zero: torch.Tensor) -> torch.Tensor:
        """Zero points as the format will store them."""
        offset = self.format.scale.offset if self.format.scale else None
        if offset is None or isinstance(offset, torch.dtype):
            return zero
        return offset.decode(offset.encode(zero))


def view_blocks(w: torch.Tensor, format: Format, importance: torch.Tensor | None) -> BlockView:
    """A weight (n, k) in the blocks of a format, each element weighted by importance (n, k) or (k,)."""
    blocks = format.blocks(tuple(w.shape))
    mask = blocks.mask(w.device)
    if importance is not None:
        mask = blocks.split(importance.float().expand(w.shape))
    return BlockView(blocks.split(w.float()), mask, format)


def absmax(w: torch.Tensor, format: Format, importance: torch.Tensor | None = None) -> Params:
    """The smallest scale that clips nothing; formats with a zero point put it where 0 sits in the middle."""
    view = view_blocks(w, format, None)
    low, high = format.grid.span
    if format.scale is not None and format.scale.offset is not None:
        bound = view.w.abs().amax(-1)
        return _affine(view, -bound, bound)
    top = view.w.amax(-1).clamp_min(0) / high
    return Params(torch.maximum(top, view.w.amin(-1).clamp_max(0) / low) if low < 0 else top)


def minmax(w: torch.Tensor, format: Format, importance: torch.Tensor | None = None) -> Params:
    """The range of each block onto the range of the grid (0 always inside); without a zero point the same as absmax."""
    if format.scale is None or format.scale.offset is None:
        return absmax(w, format)
    view = view_blocks(w, format, None)
    return _affine(view, view.w.amin(-1).clamp_max(0), view.w.amax(-1).clamp_min(0))


def _affine(view: BlockView, low: torch.Tensor, high: torch.Tensor) -> Params:
    first, last = view.format.grid.span
    scale = (high - low) / (last - first)
    zero = torch.where(scale == 0, 0.0, first - low / torch.where(scale == 0, 1.0, scale))
    # An integer zero point shifts the range by at most half a step, so an end is clipped by at most half a step.
    return Params(scale, view.round_zero(zero))


def mse(w: torch.Tensor, format: Format, importance: torch.Tensor | None = None) -> Params:
    """Least mean square error of each block: a search over clipped ranges, then alternating least squares.

    Each candidate is a shrunken range; the best is refined by solving for the scale (and zero point) with the codes
    fixed, as Lloyd's algorithm does. Never worse than minmax (absmax without a zero point).
    """
    view = view_blocks(w, format, importance)
    best = minmax(w, format)
    best_error = view.error(best)
    start = Params(best.scale, best.zero_point)
    factors = _shrink(format.grid.levels, view.w.shape[-1])
    for factor in factors:
        best_error = _keep_better(view, best, best_error, _scaled(view, start, factor))
    if _skewed(format):
        for factor in factors:
            best_error = _keep_better(view, best, best_error, Params(start.scale * -factor))
    for _ in range(3):
        best_error = _keep_better(view, best, best_error, _least_squares(view, best))
    return best


def _skewed(format: Format) -> bool:
    """Integer grids reach one step further down than up: a negative scale turns the long side to where it is needed."""
    low, high = format.grid.span
    signed = format.scale is not None and isinstance(format.scale.store, torch.dtype) and format.scale.offset is None
    return signed and low != -high


def _shrink(levels: int, block: int) -> list[float]:
    """Fractions of the full range worth trying: few levels want much clipping, many want little.

    The largest of `block` Gaussian weights grows as sqrt(2 log block), the best range does not.
    """
    floor = {2: 0.25, 3: 0.3, 4: 0.33, 8: 0.45, 16: 0.55}.get(levels, 0.75)
    floor *= min(1.0, math.sqrt(math.log(64) / math.log(max(block, 2))))
    steps = 12 if levels <= 16 else 5
    return [floor + (1 - floor) * i / steps for i in range(steps)]


def _scaled(view: BlockView, start: Params, factor: float) -> Params:
    scale = start.scale * factor
    if start.zero_point is None:
        return Params(scale)
    first, last = view.format.grid.span
    centre = (first + last) / 2
    return Params(scale, view.round_zero(centre + (start.zero_point - centre) / factor))


def _keep_better(view: BlockView, best: Params, best_error: torch.Tensor, other: Params) -> torch.Tensor:
    """Put the better of the two into `best`, block by block; returns its error."""
    error = view.error(other)
    better = error < best_error
    best.scale = torch.where(better, other.scale, best.scale)
    if best.zero_point is not None and other.zero_point is not None:
        best.zero_point = torch.where(better, other.zero_point, best.zero_point)
    return torch.where(better, error, best_error)


def _least_squares(view: BlockView, params: Params) -> Params:
    """Scale (and zero point) that fit the blocks best with the codes of `params`."""
    points = view.points(params)
    if params.zero_point is None:
        return Params(_safe_divide(view.mean(points * view.w), view.mean(points.square()), params.scale))
    mean_p, mean_w = view.mean(points), view.mean(view.w)
    covariance = view.mean(points * view.w) - mean_p * mean_w
    scale = _safe_divide(covariance, view.mean(points.square()) - mean_p.square(), params.scale)
    shift = mean_p - torch.where(scale == 0, 0.0, mean_w / torch.where(scale == 0, 1.0, scale))
    return Params(scale, view.round_zero(params.zero_point + shift))


def _safe_divide(a: torch.Tensor, b: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    return torch.where(b > 1e-12, a / b.clamp_min(1e-12), otherwise)


def hqq(w: torch.Tensor, format: Format, importance: torch.Tensor | None = None) -> Params:
    """Half-quadratic quantization (Badri and Shaji 2023): an l_p norm (p = 0.7) of the error, robust to outliers.

    Alternates the shrinkage of the error towards its large entries with a closed-form zero point; in formats without
    a zero point, or with an integer one, the scale takes its place. Each block keeps the best of at most 20 rounds.
    """
    view = view_blocks(w, format, importance)
    params = minmax(w, format)
    if format.scale is not None and isinstance(format.scale.offset, torch.dtype):
        return Params(params.scale, _half_quadratic_zero(view, params))
    beta, p = _BETA, _NORM
    best = torch.full_like(params.scale, torch.inf)
    kept = Params(params.scale, params.zero_point)
    for _ in range(_ROUNDS):
        points = view.points(params)
        error = view.w - points * params.scale[..., None]
        norm = view.mean(error.abs())
        better = norm < best
        if not bool(better.any()):
            break
        best = torch.minimum(norm, best)
        kept.scale = torch.where(better, params.scale, kept.scale)
        if kept.zero_point is not None and params.zero_point is not None:
            kept.zero_point = torch.where(better, params.zero_point, kept.zero_point)
        # In units of the step, so that the result does not depend on the magnitude of the weights.
        step = params.scale.abs().clamp_min(1e-30)[..., None]
        _half_quadratic_step(view, params, points, _shrink_lp(error / step, beta, p) * step, norm <= best)
        beta *= _GROWTH
    return kept


def _half_quadratic_zero(view: BlockView, params: Params) -> torch.Tensor:
    """The zero points (down, across) alone, scales as they are: everything in units of the step.

    With e what rounding leaves, the shrinkage takes sign(e) min(|e|, |e|^(p - 1) / beta) off it, and the closed form
    moves the zero point by the mean of that. Blocks that no longer gain drop out.
    """
    assert params.zero_point is not None
    scale, start = params.scale.flatten(), params.zero_point.flatten()
    x = view.w.flatten(0, 1) * torch.where(scale == 0, 0.0, 1 / scale)[:, None]
    parts = BlockView(
        x, None if view.importance is None else view.importance.expand_as(view.w).flatten(0, 1), view.format
    )
    active, zero, kept = torch.arange(len(x), device=x.device), start, start.clone()
    best, beta = torch.full_like(scale, torch.inf), _BETA
    for _ in range(_ROUNDS):
        error = parts.w + zero[:, None]
        error -= view.format.grid.nearest(error.clone())
        size = error.abs()
        norm = parts.mean(size)
        better = (norm < best).nonzero()[:, 0]
        if not len(better):
            break
        active, best, zero = active[better], norm[better], zero[better]
        size, error, parts.w = (t.index_select(0, better) for t in (size, error, parts.w))
        parts.importance = None if parts.importance is None else parts.importance.index_select(0, better)
        kept[active] = zero
        # |e|^(p - 1) / beta, five times as fast as a power
        taken = size.clamp_min(1e-12).log_().mul_(_NORM - 1).sub_(math.log(beta)).exp_()
        taken = torch.minimum(taken, size, out=taken).copysign_(error)
        zero = zero - parts.mean(taken)
        beta *= _GROWTH
    return kept.view(params.zero_point.shape)


def _shrink_lp(x: torch.Tensor, beta: float, p: float) -> torch.Tensor:
    """Generalised soft threshold of the l_p norm."""
    return x.sign() * (x.abs() - x.abs().clamp_min(1e-12).pow(p - 1) / beta).clamp_min_(0)


def _half_quadratic_step(
    view: BlockView, params: Params, points: torch.Tensor, outliers: torch.Tensor, move: torch.Tensor
) -> None:
    target = view.w - outliers
    whole = view.format.scale is not None and not isinstance(view.format.scale.offset, torch.dtype)
    if params.zero_point is None or whole:  # an integer zero point cannot follow small steps either
        scale = _safe_divide(view.mean(points * target), view.mean(points.square()), params.scale)
        params.scale = torch.where(move, scale, params.scale)
        return
    inverse = torch.where(params.scale == 0, 0.0, 1 / params.scale)[..., None]
    zero = view.mean(points + params.zero_point[..., None] - target * inverse)
    params.zero_point = torch.where(move, zero, params.zero_point)


@dataclass(frozen=True)
class NamedFit:
    """A fit by its name; called like any fit.

    Args:
        name: in recipes and reports.
        run: how, where nothing is known of the inputs.
        needs_hessian: it is to see their Hessian, see clip.py; `run` stands in where there is none.
    """

    name: str
    run: Fit
    needs_hessian: bool = False

    def __call__(self, w: torch.Tensor, format: Any, importance: torch.Tensor | None = None) -> Params:
        """Scales for a weight (n, k)."""
        return self.run(w, format, importance)


FITS: dict[str, NamedFit] = {
    "absmax": NamedFit("absmax", absmax),
    "minmax": NamedFit("minmax", minmax),
    "mse": NamedFit("mse", mse),
    "hqq": NamedFit("hqq", hqq),
    "clip": NamedFit("clip", mse, needs_hessian=True),
}


def get_fit(name: str | NamedFit) -> NamedFit:
    """The fit of that name (or the object itself); UsageError if there is none."""
    if not isinstance(name, str):
        return name
    if name not in FITS:
        raise UsageError(f"unknown fit {name!r}", hint=f"known fits: {', '.join(FITS)}")
    return FITS[name]
