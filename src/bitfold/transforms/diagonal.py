"""One factor for each input channel: x W^T = (x / s) (W s)^T.

Channels with large activations hand a part of their size to the weights, which makes 8-bit activations possible
(SmoothQuant, Xiao et al. 2022, arXiv 2211.10438), or gets more precision where it counts (AWQ, Lin et al. 2023, arXiv
2306.00978). Where the norm before a layer feeds nothing else, its own weight takes the factors and nothing is left to
do at run time; elsewhere they are stored beside the tensor as `input_scale` and activations are multiplied by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bitfold.errors import UsageError
from bitfold.system.tensorinfo import TensorInfo

SCALE = "input_scale"
DTYPE = torch.float16  # 11 bits: exact enough, since weights are divided by the stored factors
_SMALLEST, _LARGEST = 2.0**-14, 2.0**15  # normal numbers of float16


@dataclass(frozen=True, eq=False)
class Diagonal:
    """Factors of input channels.

    Args:
        size: number of inputs k.
        scale: (k,) positive, what activations are multiplied by; None = to be found by calibration.
    """

    size: int
    scale: torch.Tensor | None = None

    @classmethod
    def stored(cls, scale: torch.Tensor) -> Diagonal:
        """With the factors as they will be stored."""
        return cls(len(scale), scale.clamp(_SMALLEST, _LARGEST).to(DTYPE))

    def _factors(self) -> torch.Tensor:
        if self.scale is None:
            raise UsageError("the factors of the input channels were never chosen", hint="calibrate first")
        return self.scale

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Activations (..., k) in the new basis, same dtype."""
        return (x * self._factors().to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)

    def weights(self, w: torch.Tensor) -> torch.Tensor:
        """Weights (..., k) in the new basis, float32 or wider."""
        return w / self._factors().to(torch.promote_types(w.dtype, torch.float32))

    def inverse(self, w: torch.Tensor) -> torch.Tensor:
        """Weights back in the old basis."""
        return w * self._factors().to(torch.promote_types(w.dtype, torch.float32))

    def hessian(self, h: torch.Tensor) -> torch.Tensor:
        """Second moment of the inputs (k, k) -> that of the scaled ones."""
        d = self._factors().to(h.dtype)
        return h * d * d[:, None]

    def describe(self) -> dict[str, Any]:
        """JSON-able; the factors are a tensor beside the weight."""
        return {"kind": "diagonal", "size": self.size}

    def layout(self) -> dict[str, TensorInfo]:
        """Tensors stored beside the weight."""
        return {SCALE: TensorInfo(DTYPE, (self.size,))}

    def fields(self) -> dict[str, torch.Tensor]:
        """Those tensors; ones (no change) where nothing was chosen."""
        return {SCALE: torch.ones(self.size, dtype=DTYPE) if self.scale is None else self.scale}

    def with_fields(self, fields: Mapping[str, torch.Tensor]) -> Diagonal:
        """The same with the tensors of a checkpoint."""
        return Diagonal(self.size, fields[SCALE])


def smooth_scale(absmax: torch.Tensor, weight_max: torch.Tensor, alpha: float) -> torch.Tensor:
    """SmoothQuant's factors (k,) for activations, 1 / s with s = max|x|^a / max|w|^(1 - a).

    Args:
        absmax: (k,) largest |x| of each channel over the calibration text.
        weight_max: (k,) largest |w| of each column, over all layers with this input.
        alpha: how much of the difficulty moves to the weights, 0 to 1.
    """
    dead = (absmax <= 0) | (weight_max <= 0)
    s = absmax.clamp_min(1e-8).pow(alpha) / weight_max.clamp_min(1e-8).pow(1 - alpha)
    return torch.where(dead, 1.0, 1 / s)


def aware_scale(mean: torch.Tensor, ratio: float) -> torch.Tensor:
    """AWQ's factors (k,) for activations, 1 / s with s = mean|x|^ratio, the extremes balanced around 1."""
    s = mean.clamp_min(1e-4 * float(mean.max().clamp_min(1e-30))).pow(ratio)
    return (s.max() * s.min()).sqrt() / s
