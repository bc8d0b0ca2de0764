"""What calibration knows of the inputs of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

_COLUMNS = 512  # of the correction worked out at a time


@dataclass
class Statistics:
    """Second moments of the inputs of a group of layers, weighted by token.

    Args:
        hessian: (k, k) float32, sum of s x x^T over tokens, x from the quantized model.
        cross: (k, k) float32, sum of s f x^T, f the same inputs in the original model.
        tokens: how many were seen.
        absmax: (k,) largest |x| of each channel, or None where nobody looked.
        mean: (k,) mean |x| of each channel, not weighted, or None.
    """

    hessian: torch.Tensor
    cross: torch.Tensor
    tokens: int
    absmax: torch.Tensor | None = None
    mean: torch.Tensor | None = None

    def target(self, w: torch.Tensor, strength: float, damp: float, *, last: bool = False) -> torch.Tensor:
        """The weight that makes up for what the layers before have lost, part of the way (QEP, Qronos).

        (1 - a) W + a W C H^-1 is the least-squares solution of W f = W' x at a = 1; C and H are damped alike.

        Args:
            w: (n, k) float32.
            strength: a, 0 to 1.
            damp: added to both diagonals, as a share of the mean diagonal of H.
            last: C is not needed any more, and let go before the factorization.
        """
        mean = float(self.hessian.diagonal().mean())
        if strength == 0 or mean == 0 or not math.isfinite(mean):
            return w  # nothing ever reaches the layer; or overflow does, which the solver refuses by name
        lost = torch.empty(len(self.hessian), len(w), dtype=torch.float64)  # (W C - W H)^T: the ridge is on both sides
        for at in range(0, len(lost), _COLUMNS):
            part = slice(at, at + _COLUMNS)
            lost[part] = (w @ (self.cross[:, part] - self.hessian[:, part])).T
        if last:
            self.cross = self.cross[:0].clone()
        damped = self.hessian.double()
        damped.diagonal().add_(damp * mean)
        lower = damped.mT  # symmetric; its columns lie together, so that LAPACK works in place
        torch.linalg.cholesky(lower, out=lower)
        for triangle in (lower, lower.mT):
            lost = torch.linalg.solve_triangular(triangle, lost, upper=triangle is not lower)
        moved: torch.Tensor = w + strength * lost.T.float()
        return moved


@dataclass(frozen=True)
class Whole:
    """A block whose layers are to be tuned together.

    Args:
        block: its module, the weights of these layers in it as they were.
        run: the output for an input of the window of that number.
        inputs: of the quantized model, by window.
        targets: outputs of the original model, by window.
    """

    block: nn.Module
    run: Callable[[int, torch.Tensor], torch.Tensor]
    inputs: Windows
    targets: Windows


class Windows(Protocol):
    """Activations by window."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> torch.Tensor: ...


class Sums:
    """Statistics in the making.

    Args:
        shape: of the weight, so that the number of inputs is known even if none ever comes: one of the two.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = shape
        self._hessian: torch.Tensor | None = None
        self._cross = self._absmax = self._sum = torch.zeros(0)
        self.tokens = 0

    def add(self, x: torch.Tensor, original: torch.Tensor | None, weight: torch.Tensor | None) -> None:
        """Inputs (tokens, k), the same tokens in the original model, weights of the tokens (tokens, 1).

        Where the original model's tokens are others (an expert got more or fewer), there is no drift to correct.
        """
        if self._hessian is None:
            k = x.shape[1]
            self._hessian, self._cross = torch.zeros(k, k), torch.zeros(k, k)
            self._absmax, self._sum = torch.zeros(k), torch.zeros(k)
        matched = original if original is not None and original.shape == x.shape else x
        weighted = x if weight is None or len(weight) != len(x) else x * weight
        self._hessian.addmm_(weighted.T, x)
        self._cross.addmm_(matched.T, weighted)
        size = x.abs()
        if len(x):
            self._absmax = torch.maximum(self._absmax, size.amax(0))
        self._sum += size.sum(0)
        self.tokens += len(x)

    def statistics(self) -> Statistics:
        """The result, to be asked for once; no tokens make a Hessian of zeros."""
        if self._hessian is None:
            empty = torch.zeros(self._shape[-1], self._shape[-1])
            return Statistics(empty, empty, 0)
        n = max(1, self.tokens)
        return Statistics(self._hessian.div_(n), self._cross.div_(n), self.tokens, self._absmax, self._sum / n)
