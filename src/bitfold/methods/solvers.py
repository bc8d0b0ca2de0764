"""Solvers: which codes. One line a solver; what the rest of the house asks of one stands in its line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from bitfold.errors import UsageError
from bitfold.formats import AnyFormat, Fit
from bitfold.methods.aqlm import aqlm
from bitfold.methods.gptq import gptq, ldlq
from bitfold.methods.hessian import Moments
from bitfold.methods.rtn import rtn
from bitfold.qtensor import QTensor

__all__ = ["SOLVERS", "Requirement", "Solver", "get_solver"]


@dataclass(frozen=True)
class Requirement:
    """What a solver asks of a format.

    Args:
        holds: whether a format has it.
        otherwise: what is said of one that has not, after its name.
    """

    holds: Callable[[AnyFormat], bool]
    otherwise: str


@dataclass(frozen=True)
class Solver:
    """A weight (n, k), the Hessian of its inputs (k, k) or None, a format and a fit -> the quantized weight.

    Args:
        name: in recipes; with its number, as in gptq:0.05.
        run: what makes the codes.
        needs_hessian: it wants the Hessian of the inputs, and so calibration text.
        feeds_errors: column by column, errors fed forward: it can prune on the way, takes a damping, refits row scales.
        tunes_blocks: `run` is only where it starts from; the layers of a block are then tuned together.
        requires: of a format; None = nothing.
        damp: share of the mean diagonal added to the Hessian; None = its own.
        steps: of tuning.
    """

    name: str
    run: Callable[..., QTensor]
    needs_hessian: bool = False
    feeds_errors: bool = False
    tunes_blocks: bool = False
    requires: Requirement | None = None
    damp: float | None = None
    steps: int = 0

    def __call__(
        self, w: torch.Tensor, hessian: Moments | None, format: AnyFormat, fit: Fit, *, seed: int = 0, **how: Any
    ) -> QTensor:
        """Quantize one weight; `how`: what only some solvers take (`refit`, `pruner`)."""
        damped = how if self.damp is None else {"damp": self.damp, **how}
        return self.run(w, hessian, format, fit, seed=seed, **damped)

    def misfit(self, format: AnyFormat) -> str | None:
        """Why it cannot make codes of that format, in words; None if it can."""
        wanted = self.requires
        return None if wanted is None or wanted.holds(format) else f"{format.name} {wanted.otherwise}"

    def with_number(self, text: str) -> Solver:
        """With the damping or the number of steps that stands after the colon of its name.

        Raises:
            UsageError: no such number, or a solver that takes none.
        """
        name = f"{self.name}:{text}"
        if self.feeds_errors:
            return replace(self, name=name, damp=_damping(text))
        if not self.tunes_blocks:
            raise UsageError(f"unknown solver {name!r}: {self.name} takes no number")
        if not text.isdecimal() or int(text) < 1:
            raise UsageError(f"{text!r} is no number of steps", hint="as in signround:200")
        return replace(self, name=name, steps=int(text))


_COLUMNS = Requirement(lambda format: format.coder is not None, "cannot be coded column by column")
_BOOKS = Requirement(lambda format: format.books is not None, "has no codebooks")
_LEVELS = Requirement(lambda format: format.grid is not None, "has no evenly spaced levels")
_LINES = (
    Solver("rtn", rtn),
    Solver("ldlq", ldlq, needs_hessian=True, feeds_errors=True, requires=_COLUMNS),
    Solver("gptq", gptq, needs_hessian=True, feeds_errors=True, requires=_COLUMNS),
    Solver("aqlm", aqlm, needs_hessian=True, requires=_BOOKS),
    Solver("signround", rtn, needs_hessian=True, tunes_blocks=True, requires=_LEVELS, steps=80),
)
SOLVERS: dict[str, Solver] = {solver.name: solver for solver in _LINES}


def get_solver(name: str | Solver) -> Solver:
    """The solver of that name (or the object itself); `ldlq:0.05` has a damping, `signround:200` a number of steps.

    Raises:
        UsageError: there is none.
    """
    if not isinstance(name, str):
        return name
    kind, colon, number = name.partition(":")
    if kind not in SOLVERS:
        raise UsageError(f"unknown solver {name!r}", hint=f"known solvers: {', '.join(SOLVERS)}")
    return SOLVERS[kind].with_number(number) if colon else SOLVERS[kind]


def _damping(text: str) -> float:
    try:
        damp = float(text)
    except ValueError:
        damp = -1.0
    if not 0 < damp < 100:
        raise UsageError(f"{text!r} is no damping", hint="a share of the mean diagonal, as in gptq:0.01")
    return damp
