"""Solvers: which codes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from bitfold.errors import UsageError
from bitfold.formats import AnyFormat, Fit
from bitfold.methods.aqlm import aqlm
from bitfold.methods.gptq import gptq, ldlq
from bitfold.methods.rtn import rtn
from bitfold.qtensor import QTensor

__all__ = [
    "CALIBRATED",
    "SOLVERS",
    "Solver",
    "aqlm",
    "get_solver",
    "gptq",
    "is_calibrated",
    "is_feedback",
    "ldlq",
    "misfit",
    "rtn",
]


def signround(w: torch.Tensor, hessian: torch.Tensor | None, format: AnyFormat, fit: Fit, *, seed: int = 0) -> QTensor:
    """What SignRound starts from, rounding to nearest: it tunes the layers of a block together, see signround.py."""
    return rtn(w, hessian, format, fit, seed=seed)


class Solver(Protocol):
    """A weight (n, k), the Hessian of its inputs (k, k) or None, a format and a fit -> the quantized weight."""

    def __call__(
        self, w: torch.Tensor, hessian: torch.Tensor | None, format: AnyFormat, fit: Fit, *, seed: int = 0
    ) -> QTensor: ...


# Solvers that want a Hessian, and so calibration text.
CALIBRATED = ("ldlq", "gptq", "aqlm", "signround")
SOLVERS: dict[str, Solver] = {"rtn": rtn, "ldlq": ldlq, "gptq": gptq, "aqlm": aqlm, "signround": signround}
# What a solver asks of a format: an attribute, and what is said when it is not there.
_COLUMNS = ("coder", "cannot be coded column by column")
_NEEDS = {"ldlq": _COLUMNS, "gptq": _COLUMNS, "aqlm": ("books", "has no codebooks")}
_NEEDS["signround"] = ("grid", "has no evenly spaced levels")
_DAMPED = ("ldlq", "gptq")


def get_solver(name: str) -> Solver:
    """The solver of that name; `ldlq:0.05` has a damping, `signround:200` a number of steps. UsageError if none."""
    kind, _, number = name.partition(":")
    if kind == "signround" and number.isdecimal() and int(number) > 0:
        return signround
    if kind not in SOLVERS or (":" in name and kind not in _DAMPED):
        raise UsageError(f"unknown solver {name!r}", hint=f"known solvers: {', '.join(SOLVERS)}")
    solver: Callable[..., QTensor] = SOLVERS[kind]
    return partial(solver, damp=_damping(number)) if ":" in name else SOLVERS[kind]


def is_calibrated(name: str) -> bool:
    """Whether the solver of that name wants a Hessian."""
    return name.partition(":")[0] in CALIBRATED


def is_feedback(name: str) -> bool:
    """Whether the solver of that name feeds errors forward column by column, and so can prune on the way."""
    return name.partition(":")[0] in _DAMPED


def misfit(name: str, format: AnyFormat) -> str | None:
    """Why the solver of that name cannot make codes of that format, in words; None if it can."""
    attribute, words = _NEEDS.get(name.partition(":")[0], ("name", ""))
    return None if getattr(format, attribute) is not None else f"{format.name} {words}"


def _damping(text: str) -> float:
    try:
        damp = float(text)
    except ValueError:
        damp = -1.0
    if not 0 < damp < 100:
        raise UsageError(f"{text!r} is no damping", hint="a share of the mean diagonal, as in gptq:0.01")
    return damp
