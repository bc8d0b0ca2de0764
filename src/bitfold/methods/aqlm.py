"""AQLM: additive codebooks under the Hessian of the inputs (Egiazarian et al. 2024, arXiv 2401.06118).

The loss tr((W - Q) H (W - Q)^T) is lowered by one part of Q at a time, the others fixed, each step to where the loss is
no larger than before:

    codes    group after group of 8 columns, all rows at once: what the other groups leave over is approximated by beam
             search in the metric of the group's own block of H
    books    least squares, by conjugate gradients: Q is linear in the entries
    scales   least squares, row by row

It begins with the books of the format (residual k-means on the weights) and codes fed forward as LDLQ does. Where the
paper learns books and scales by Adam, and tunes whole blocks, here they are solved for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfold.errors import FormatError
from bitfold.formats import AnyFormat, Fit
from bitfold.formats.families.codebooks import BEAM, WIDTH, beam_search, values_of
from bitfold.methods.gptq import DAMP, ldlq
from bitfold.qtensor import QTensor

_ROUNDS = 3
_GRADIENTS = 8  # steps of conjugate gradients for the books
_OUTER = 16  # groups coded before their changes reach the rest in one product


def aqlm(
    w: Tensor,
    hessian: Tensor | None,
    format: AnyFormat,
    fit: Fit,
    *,
    seed: int = 0,
    damp: float = DAMP,
    rounds: int = _ROUNDS,
    beam: int = BEAM,
) -> QTensor:
    """Additive codes of w, refined under the Hessian.

    Args:
        w: (n, k), any float dtype.
        hessian: (k, k), second moment of the inputs; None = the codes of the format, nothing to refine.
        format: one with codebooks (`aqlm-2x8` and its like).
        fit: not used; scales are solved for.
        seed: not used: the books begin the same every time.
        damp: added to the diagonal, as a share of its mean.
        rounds: of books, scales and codes; 0 = what LDLQ gives.
        beam: choices kept by the search.

    Raises:
        FormatError: the format has no codebooks.
        WeightError: the Hessian is not finite, or singular whatever the damping.
    """
    if format.books is None:
        raise FormatError(f"{format.name} has no codebooks", hint="use aqlm-2x8 or its like, or another method")
    started = ldlq(w, hessian, format, fit, damp=damp)
    if hessian is None or rounds == 0:
        return started
    work = _Work(w, hessian, started, damp)
    for _ in range(rounds):
        work.refit_books()
        work.refit_scales()
        work.search(beam)
    work.refit_books()
    return work.finish()


class _Work:
    """A weight under way; k padded to whole groups."""

    def __init__(self, w: Tensor, hessian: Tensor, q: QTensor, damp: float) -> None:
        format: Any = q.format
        self._format = format
        self._shape = q.shape
        pad = -w.shape[1] % WIDTH
        self._w = F.pad(w.detach().float(), (0, pad))
        h = F.pad(hessian.float(), (0, pad, 0, pad))
        self._h = h + damp * float(h.diagonal().mean()) * torch.eye(len(h))
        self._codes: Tensor = format.codes_of(q.fields, q.shape)
        self._books = q.fields["codebooks"].float()
        self._scale = q.fields["scale"].float()

    def loss(self) -> float:
        """tr(E H E^T), E the error of what is under way."""
        error = self._w - self._values(self._books) * self._scale
        return float(((error @ self._h) * error).sum(dtype=torch.float64))

    def finish(self) -> QTensor:
        """The weight as it is stored."""
        return QTensor(self._format, self._shape, self._format.store(self._codes, self._books, self._scale))

    def _values(self, books: Tensor) -> Tensor:
        """(n, k) at scale 1."""
        return values_of(books, self._codes.flatten(0, 1)).view(len(self._w), -1)

    def _gather(self, x: Tensor) -> Tensor:
        """The transpose of `_values` times the scales: (n, k) -> one sum for each entry of each book."""
        vectors = (x * self._scale).view(-1, WIDTH)
        codes = self._codes.flatten(0, 1)
        sums = [torch.zeros_like(self._books[0]).index_add_(0, c, vectors) for c in codes.T]
        return torch.stack(sums)

    def refit_books(self) -> None:
        """Conjugate gradients on the normal equations, from where the books are; the loss never rises."""
        before, old = self.loss(), self._books
        residual = self._gather((self._w - self._values(old) * self._scale) @ self._h)
        direction, norm = residual, residual.square().sum()
        books = old
        for _ in range(_GRADIENTS):
            moved = self._values(direction) * self._scale
            turned = moved @ self._h
            curvature = (moved * turned).sum()
            if not curvature > 0:
                break
            step = norm / curvature
            books = books + step * direction
            residual = residual - step * self._gather(turned)
            last, norm = norm, residual.square().sum()
            direction = residual + norm / last * direction
        self._books = self._format.round_books(books)
        if not self.loss() <= before:
            self._books = old

    def refit_scales(self) -> None:
        """For each row the best scale on its values, (w H q) / (q H q), as it is stored."""
        values = self._values(self._books)
        turned = values @ self._h
        top, bottom = (turned * self._w).sum(1, keepdim=True), (turned * values).sum(1, keepdim=True)
        best = torch.where(bottom > 0, top / bottom.clamp_min(1e-30), self._scale).to(torch.bfloat16).float()
        # (w - s q) H (w - s q)^T is a parabola in s: rounding may have moved s past the old scale.
        closer = (best * bottom - top).abs() < (self._scale * bottom - top).abs()
        self._scale = torch.where(closer & (best > 0), best, self._scale)

    def search(self, beam: int) -> None:
        """Each group of columns once, from left to right; the loss of no row rises."""
        carried = (self._w - self._values(self._books) * self._scale) @ self._h
        groups = self._codes.shape[1]
        for first in range(0, groups, _OUTER):
            last = min(first + _OUTER, groups)
            here = slice(first * WIDTH, last * WIDTH)
            change = torch.cat([self._search_group(g, carried, here, beam) for g in range(first, last)], 1)
            carried[:, here.stop :] -= change @ self._h[here, here.stop :]

    def _search_group(self, group: int, carried: Tensor, here: slice, beam: int) -> Tensor:
        """New codes for one group; returns by how much its values moved, and tells the groups up to here.stop."""
        part = slice(group * WIDTH, (group + 1) * WIDTH)
        metric = torch.linalg.cholesky(self._h[part, part])
        old = values_of(self._books, self._codes[:, group])
        # The best value is old + carried H_gg^-1 / scale; in the metric L, H_gg = L L^T, distances are Euclidean.
        wanted = torch.linalg.solve_triangular(metric.T, carried[:, part], upper=True, left=False)
        usable = self._scale != 0
        target = old @ metric + torch.where(usable, wanted / torch.where(usable, self._scale, 1.0), 0.0)
        self._codes[:, group] = beam_search(target, self._books @ metric, self._codes[:, group], beam=beam)
        change = (values_of(self._books, self._codes[:, group]) - old) * self._scale
        rest = slice(part.stop, here.stop)
        carried[:, rest] -= change @ self._h[part, rest]
        return change
