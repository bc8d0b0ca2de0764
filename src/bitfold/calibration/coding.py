"""Rows of layers under one Hessian: corrected for drift, coded, and measured.

Rows do not know each other once the Hessian is there, so they are taken in pieces: which ones is fixed by the shape and
the number of threads, and whoever codes some of the pieces makes the bytes of the one who codes all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from bitfold.calibration.one_layer import solve
from bitfold.calibration.statistics import Statistics
from bitfold.methods.gptq import row_losses, row_pieces
from bitfold.methods.hessian import Moments
from bitfold.qtensor import QTensor, cut_rows, rows_stack
from bitfold.recipes.scheme import Scheme
from bitfold.transforms import Transform

_RIDGE = 0.1  # of the mean diagonal, in the drift correction: what the text says least about moves least
_PIECE = 1 << 18  # weights compared at a time


@dataclass(frozen=True)
class Coding:
    """What is to be done to the rows of some layers of one input.

    Args:
        scheme: of all of them.
        names: of their tensors, for errors.
        shapes: (n, k) of each, in the order of the rows.
        transform: the basis in which they are coded.
        statistics: of their input; None = there are no data.
        blind: whether the codes are chosen without them, as too few tokens came.
        drift: strength of the drift correction, 0 to 1.
        seed: of the solver.
        refit: of the row scales, see `ldlq`.
        last: whether the statistics may be used up: a wide Hessian is among the largest things there are.
    """

    scheme: Scheme
    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    transform: Transform | None
    statistics: Statistics | None
    blind: bool
    drift: float
    seed: int
    refit: bool
    last: bool

    @property
    def stacked(self) -> bool:
        """Whether the layers are coded as one; else one after the other."""
        # SparseGPT shares its zeros out among all rows that it sees: each layer gets its own.
        alone = self.scheme.sparsity is not None and self.scheme.sparsity.on_the_way
        return rows_stack(self.scheme.format, self.shapes) and not alone


@dataclass(frozen=True)
class Coded:
    """Rows done.

    Args:
        qs: all rows as one weight, or each layer by itself.
        flags: what went otherwise than it should.
        apart: (n, 2) float64, squares of (aim - codes) and of the aim, by row.
        losses: (n, 2) float64, see `row_losses`; None without data.
    """

    qs: list[QTensor]
    flags: tuple[str, ...]
    apart: torch.Tensor
    losses: torch.Tensor | None


Coder = Callable[[Coding, torch.Tensor], Coded]


def code(coding: Coding, whole: torch.Tensor) -> Coded:
    """Code all rows, here.

    Args:
        coding: how.
        whole: (n, k) float32, the weights of the layers, rows upon rows.
    """
    shapes = [(len(whole), whole.shape[1])] if coding.stacked else list(coding.shapes)
    target = _target(coding, whole)
    hessian = None if coding.blind else _in_basis(coding)
    if coding.last and coding.statistics is not None:
        coding.statistics.hessian = torch.zeros(0, 0)
    how = partial(solve, coding.scheme, hessian=hessian, seed=coding.seed, refit=coding.refit)
    names = [", ".join(coding.names)] if coding.stacked else coding.names
    qs, flags, measured = list[QTensor](), list[str](), list[tuple[torch.Tensor, torch.Tensor | None]]()
    for part, name in zip(torch.split(target, [n for n, _ in shapes]), names, strict=True):
        q, odd = how(part, name=name)
        qs.append(q)
        flags += odd
        measured += _measured(part, q, hessian)
    losses = None if hessian is None else torch.cat([lost for _, lost in measured if lost is not None])
    return Coded(qs, tuple(dict.fromkeys(flags)), torch.cat([apart for apart, _ in measured]), losses)


def _by_pieces(function: Callable[[torch.Tensor], torch.Tensor], coding: Coding, whole: torch.Tensor) -> torch.Tensor:
    pieces = row_pieces(coding.scheme.format, whole)
    if len(pieces) == 1:
        return function(whole)
    out = torch.empty_like(whole)
    for rows in pieces:
        out[rows] = function(whole[rows])
    return out


def _target(coding: Coding, whole: torch.Tensor) -> torch.Tensor:
    """What is to be coded: the weights corrected for drift, in the new basis."""
    known, transform = coding.statistics, coding.transform
    first = known is None or known.in_basis  # the basis comes first
    if transform is not None and first:
        whole = _by_pieces(transform.weights, coding, whole)
    if known is not None:
        pieces = row_pieces(coding.scheme.format, whole)
        whole = known.target(whole, coding.drift, damp=_RIDGE, last=coding.last, pieces=pieces)
    return whole if transform is None or first else _by_pieces(transform.weights, coding, whole)


def _in_basis(coding: Coding) -> Moments | None:
    """The Hessian of the inputs as the codes will meet them."""
    if coding.statistics is None:
        return None
    hessian = coding.statistics.hessian
    if coding.statistics.in_basis or coding.transform is None:
        return hessian
    assert isinstance(hessian, torch.Tensor), "ranges of inputs are measured in their basis"
    return coding.transform.hessian(hessian)


def _measured(
    target: torch.Tensor, q: QTensor, hessian: Moments | None
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """By pieces: how far the codes are from what they aim at, and what that costs."""
    found = []
    for rows in row_pieces(q.format, target):
        decoded, aim = cut_rows(q, rows.start, rows.stop).dequantize(), target[rows]
        lost = None if hessian is None else row_losses(aim, decoded, hessian).cpu()
        found.append((_apart(aim, decoded).cpu(), lost))
    return found


def _apart(aim: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
    """(n, 2) float64: squares of the difference and of the aim, some rows at a time."""
    step = max(1, _PIECE // aim.shape[1])
    found = []
    for a, d in zip(torch.split(aim, step), torch.split(decoded, step), strict=True):
        norms = [torch.linalg.vector_norm(x, dim=1, dtype=torch.float64) for x in (a - d, a)]
        found.append(torch.stack(norms, 1).square())
    return torch.cat(found)


def share_of(sums: torch.Tensor) -> float:
    """Of (n, 2): the sum of the first by that of the second; 0 where there is nothing."""
    part, whole = (float(x) for x in sums.sum(0))
    return part / whole if whole > 0 else 0.0
