"""Solvers: which codes."""

from __future__ import annotations

from typing import Protocol

import torch

from bitfold.errors import UsageError
from bitfold.formats import AnyFormat, Fit
from bitfold.qtensor import QTensor
from bitfold.solvers.ldlq import ldlq
from bitfold.solvers.rtn import rtn

__all__ = ["CALIBRATED", "SOLVERS", "Solver", "get_solver", "ldlq", "rtn"]


class Solver(Protocol):
    """A weight (n, k), the Hessian of its inputs (k, k) or None, a format and a fit -> the quantized weight."""

    def __call__(
        self, w: torch.Tensor, hessian: torch.Tensor | None, format: AnyFormat, fit: Fit, *, seed: int = 0
    ) -> QTensor: ...


# Solvers that want a Hessian, and so calibration text.
CALIBRATED = ("ldlq",)
SOLVERS: dict[str, Solver] = {"rtn": rtn, "ldlq": ldlq}


def get_solver(name: str) -> Solver:
    """The solver of that name; UsageError if there is none."""
    if name not in SOLVERS:
        raise UsageError(f"unknown solver {name!r}", hint=f"known solvers: {', '.join(SOLVERS)}")
    return SOLVERS[name]
