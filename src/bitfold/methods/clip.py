"""AWQ's clipping as a fit: of shrunken ranges, the one that costs the output of the layer least (arXiv 2306.00978).

The cost of a group of weights is d^T H d with d its rounding errors and H the group's own block of the Hessian of the
inputs: what the group's errors do to the layer's output if the other groups made none.
"""

from __future__ import annotations

import torch

from bitfold.formats import Fit, Format, Params
from bitfold.methods.fits import minmax, mse, view_blocks

_STEPS, _SMALLEST = 16, 0.4  # ranges tried, and the smallest as a share of the whole one
_WIDEST = 256  # columns up to which a group's block of H is used whole; its diagonal beyond


def clip(hessian: torch.Tensor) -> Fit:
    """The fit for inputs with this second moment (k, k)."""

    def fit(w: torch.Tensor, format: Format, importance: torch.Tensor | None = None) -> Params:
        blocks = format.blocks(tuple(w.shape))
        diagonal = hessian.diagonal().clamp_min(1e-12)
        best = mse(w, format, diagonal)
        if blocks.rows != 1 or blocks.cols > _WIDEST:
            return best
        cost = _Cost(w, hessian, format)
        error = cost(best)
        start = minmax(w, format)
        for step in range(_STEPS):
            error = _keep(cost, best, error, _shrunk(start, format, 1 - (1 - _SMALLEST) * step / _STEPS))
        return best

    return fit


class _Cost:
    """d^T H d of each block under some scales."""

    def __init__(self, w: torch.Tensor, hessian: torch.Tensor, format: Format) -> None:
        self._view = view_blocks(w, format, None)
        blocks = format.blocks((w.shape[0], w.shape[1]))
        across, cols = blocks.grid[1], blocks.cols
        padded = torch.nn.functional.pad(hessian.float(), (0, across * cols - w.shape[1]) * 2)
        square = padded.view(across, cols, across, cols)
        self._grams = torch.stack([square[i, :, i] for i in range(across)])  # (across, cols, cols)

    def __call__(self, params: Params) -> torch.Tensor:
        """(n, across)."""
        d = self._view.difference(params).transpose(0, 1)
        return ((d @ self._grams) * d).sum(-1).T


def _shrunk(start: Params, format: Format, factor: float) -> Params:
    scale = start.scale * factor
    if start.zero_point is None:
        return Params(scale)
    centre = sum(format.span) / 2
    zero = centre + (start.zero_point - centre) / factor
    offset = format.scale.offset if format.scale is not None else None
    stored = zero if offset is None or isinstance(offset, torch.dtype) else offset.decode(offset.encode(zero))
    return Params(scale, stored)


def _keep(cost: _Cost, best: Params, error: torch.Tensor, other: Params) -> torch.Tensor:
    found = cost(other)
    better = found < error
    best.scale = torch.where(better, other.scale, best.scale)
    if best.zero_point is not None and other.zero_point is not None:
        best.zero_point = torch.where(better, other.zero_point, best.zero_point)
    return torch.where(better, found, error)
