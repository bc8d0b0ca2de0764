"""Which factors of input channels: SmoothQuant's in closed form, AWQ's by search."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bitfold.calibration.statistics import Statistics
from bitfold.formats import AnyFormat
from bitfold.methods.fits import minmax
from bitfold.methods.rtn import rtn
from bitfold.transforms import Diagonal, TransformSpec, aware_scale, smooth_scale

RATIOS = 20  # exponents tried, from 0 on
_ROWS = 1024  # of the weights that judge an exponent


def find_factors(
    wish: TransformSpec, weights: Sequence[torch.Tensor], statistics: Statistics, format: AnyFormat
) -> torch.Tensor | None:
    """(k,) what activations are to be multiplied by; None where nothing is known of them, or nothing helps.

    Args:
        wish: "smooth" or "awq".
        weights: (n_i, k) float32, the layers of one input.
        statistics: of that input.
        format: in which they will be stored.
    """
    if statistics.absmax is None or statistics.mean is None or statistics.tokens == 0:
        return None
    if wish.kind == "smooth":
        largest = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
        return smooth_scale(statistics.absmax, largest, wish.alpha)
    assert isinstance(statistics.hessian, torch.Tensor), "factors are searched for under the whole Hessian"
    return _search(_some_rows(weights), statistics.hessian, statistics.mean, format)


def _search(w: torch.Tensor, hessian: torch.Tensor, mean: torch.Tensor, format: AnyFormat) -> torch.Tensor | None:
    """The exponent whose factors, with rounding to nearest, cost the output of the layer least (AWQ, section 3.2).

    The loss |(W - Q) X|^2 is tr((W - Q) H (W - Q)^T): the activations themselves are not needed.
    """
    best, least = None, _loss(w, None, hessian, format)
    for step in range(1, RATIOS):
        scale = aware_scale(mean, step / RATIOS)
        loss = _loss(w, scale, hessian, format)
        if loss < least:
            best, least = scale, loss
    return best


def _loss(w: torch.Tensor, scale: torch.Tensor | None, hessian: torch.Tensor, format: AnyFormat) -> float:
    transform = None if scale is None else Diagonal.stored(scale)
    in_basis = w if transform is None else transform.weights(w)
    q = rtn(in_basis, None, format, minmax).dequantize()
    lost = w - (q if transform is None else transform.inverse(q))
    return float(((lost @ hessian) * lost).sum(dtype=torch.float64))


def _some_rows(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of all of them, evenly."""
    rows = torch.cat(list(weights))
    return rows[:: max(1, len(rows) // _ROWS)]
