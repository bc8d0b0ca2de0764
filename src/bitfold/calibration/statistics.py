"""What calibration knows of the inputs of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import nn

from bitfold.methods.hessian import BlockDiagonal, Moments, column_ranges, diagonal_blocks

_COLUMNS = 512  # of the correction worked out at a time
_WEIGHTS = 1 << 24  # corrected at a time
ROWS = 1024  # of a product at a time
_HESSIAN, _CROSS, _DEFICIT = "hessian", "cross", "deficit"
WINDOWS = 4  # of the text that make a group: multiplied in float32, then added in float64


@dataclass(frozen=True)
class Wanted:
    """What is to be known of the inputs of some layers.

    Args:
        cross: what they have to do with the same inputs in the original model as well.
        columns: inputs whose second moments are kept together; None = all.
        basis: what turns the inputs beforehand; None = nothing.
    """

    cross: bool = True
    columns: int | None = None
    basis: Callable[[torch.Tensor], torch.Tensor] | None = None


_EVERYTHING = Wanted()


@dataclass
class Statistics:
    """Second moments of the inputs of a group of layers, weighted by token.

    Args:
        hessian: (k, k) float32, sum of s x x^T over tokens, x from the quantized model; or squares of it.
        cross: (k, k) float32, sum of s f x^T, f the same inputs in the original model; None where nobody asked.
        deficit: (n, k) float32, sum of s d x^T, in place of it where the output of the layer is added to what others
            made: d is what that sum was in the original model, less what it is now, with the weight still as it was.
        tokens: how many were seen.
        absmax: (k,) largest |x| of each channel, or None where nobody looked.
        mean: (k,) mean |x| of each channel, not weighted, or None.
        in_basis: whether `hessian` and `cross` are about inputs turned by the basis that was wanted.
    """

    hessian: Moments
    cross: Moments | None
    tokens: int
    absmax: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    in_basis: bool = False
    deficit: torch.Tensor | None = None

    def target(
        self,
        w: torch.Tensor,
        strength: float,
        damp: float,
        *,
        last: bool = False,
        pieces: Sequence[slice] = (slice(None),),
    ) -> torch.Tensor:
        """The weight that makes up for what the layers before have lost, part of the way (QEP, Qronos).

        (1 - a) W + a W C H^-1 is the least-squares solution of W f = W' x at a = 1; C and H are damped alike. Of a
        layer with a deficit D, W + a D H^-1 is that of W x + d = W' x: it makes up for the whole sum behind it (LoaQ,
        Lin and Wan 2025, arXiv 2509.06297).

        Args:
            w: (n, k) float32, in the basis of the statistics.
            strength: a, 0 to 1.
            damp: added to both diagonals, as a share of the mean diagonal of H.
            last: C is not needed any more, and let go before the factorization.
            pieces: rows that are multiplied at a time; other ones round otherwise.
        """
        mean = float(self.hessian.diagonal().mean())
        known = self.deficit is not None or self.cross is not None
        if not known or strength == 0 or mean == 0 or not math.isfinite(mean):
            return w  # nothing ever reaches the layer; or overflow does, which the solver refuses by name
        if self.deficit is None:
            moved = self._lacking(w, pieces)
        else:
            moved = self.deficit if last else self.deficit.clone()
        if last:
            self.cross = self.deficit = None
        for part, h in diagonal_blocks(self.hessian):
            _divide([moved[rows, part] for rows in pieces], h, damp)
        return moved.mul_(strength).add_(w)

    def _lacking(self, w: torch.Tensor, pieces: Sequence[slice]) -> torch.Tensor:
        """W C - W H, which is the deficit of the layer's output alone: the ridge is on both sides."""
        assert self.cross is not None
        moved = torch.empty_like(w)
        for (part, h), (_, c) in zip(diagonal_blocks(self.hessian), diagonal_blocks(self.cross), strict=True):
            for at in range(part.start, part.stop, _COLUMNS):
                here = slice(at - part.start, min(at + _COLUMNS, part.stop) - part.start)
                difference = c[:, here] - h[:, here]
                for rows in pieces:
                    moved[rows, at : at + here.stop - here.start] = w[rows, part] @ difference
        return moved


def _divide(some: Sequence[torch.Tensor], hessian: torch.Tensor, damp: float) -> None:
    """x <- x H^-1 with a ridge, for each x of some."""
    damped = hessian.double()
    damped.diagonal().add_(damp * float(hessian.diagonal().mean()))
    damped.diagonal().clamp_min_(torch.finfo(torch.float32).tiny)  # inputs that are always zero
    lower = damped.mT  # symmetric; its columns lie together, so that LAPACK works in place
    torch.linalg.cholesky(lower, out=lower)
    for rows in (rows for x in some for rows in torch.split(x, max(1, _WEIGHTS // x.shape[1]))):
        wanted = rows.T.double()
        for triangle in (lower, lower.mT):
            wanted = torch.linalg.solve_triangular(triangle, wanted, upper=triangle is not lower)
        rows.copy_(wanted.T)


@dataclass(frozen=True)
class TuningBlock:
    """A block whose layers are to be tuned together.

    Args:
        block: its module, the weights of these layers in it as they were.
        run: the output for an input of the window of that number.
        inputs: of the quantized model, by window.
        targets: outputs of the original model, by window.
    """

    block: nn.Module
    run: Callable[[int, torch.Tensor], torch.Tensor]
    inputs: HiddenStates
    targets: HiddenStates


@dataclass(frozen=True)
class _Heard:
    """Inputs of a window (tokens, k), those in the original model or a deficit, weights of the tokens (tokens, 1)."""

    x: torch.Tensor
    other: torch.Tensor
    weight: torch.Tensor | None


class HiddenStates(Protocol):
    """Activations by window."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> torch.Tensor: ...


class Sums:
    """Statistics in the making: products of a few windows in float32, their sums in float64.

    Which windows are taken together and in which order is fixed, so that the bits of the sums do not depend on who took
    them: windows that another process has heard come as its `part`, and are added in their turn.

    Args:
        shape: of the weight, so that the number of inputs is known even if none ever comes.
        wanted: what is to be known.
    """

    def __init__(self, shape: Sequence[int], wanted: Wanted = _EVERYTHING) -> None:
        self._shape, self._wanted = shape, wanted
        self._ranges: list[slice] = []
        self._totals: dict[str, list[torch.Tensor]] = {}
        self._pending: list[_Heard] = []
        self._absmax = self._sizes = self._group = torch.zeros(0)  # largest, summed, summed of the group at hand
        self._rows: int | None = None  # of a deficit, if there is one
        self.tokens = 0

    def add(
        self,
        x: torch.Tensor,
        original: torch.Tensor | None,
        weight: torch.Tensor | None,
        deficit: torch.Tensor | None = None,
    ) -> None:
        """Inputs (tokens, k), the same tokens in the original model, weights of the tokens (tokens, 1).

        They are kept until `close`. Where the original model's tokens are others (an expert got more or fewer), there
        is no drift to correct. `deficit` (tokens, n): see `Statistics`; of all windows, or of none.
        """
        if not self._ranges:
            self._begin(x.shape[1], x.device)
        original, weight, deficit = (None if t is None else t.to(x.device) for t in (original, weight, deficit))
        size = x.abs()
        if len(x):
            self._absmax = torch.maximum(self._absmax, size.amax(0))
        self._group += size.sum(0, dtype=torch.float64)
        self.tokens += len(x)
        same = original is None or original.shape != x.shape
        x = self._into_basis(x)
        other = x if same or original is None or not self._wanted.cross else self._into_basis(original)
        if deficit is not None:
            other, self._rows = deficit, deficit.shape[1]
        self._pending.append(_Heard(x, other, None if weight is None or len(weight) != len(x) else weight))

    def _begin(self, k: int, device: torch.device) -> None:
        self._ranges = column_ranges(k, self._wanted.columns)
        self._absmax = torch.zeros(k, device=device)
        self._sizes, self._group = (torch.zeros(k, dtype=torch.float64, device=device) for _ in range(2))

    def _into_basis(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._wanted.basis is None else self._wanted.basis(x)

    def _matrices(self, dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
        sizes = [part.stop - part.start for part in self._ranges]
        device, found = self._absmax.device, {_HESSIAN: [(size, size) for size in sizes]}
        if self._rows is not None:
            found[_DEFICIT] = [(self._rows, size) for size in sizes]
        elif self._wanted.cross:
            found[_CROSS] = found[_HESSIAN]
        zeros = partial(torch.zeros, dtype=dtype, device=device)
        return {kind: [zeros(shape) for shape in shapes] for kind, shapes in found.items()}

    def close(self) -> None:
        """The windows since the last time make a group: their products are added."""
        if self._pending:
            self._totals = self._totals or self._matrices(torch.float64)
            self._multiply(self._totals)
            self._sizes += self._group
            self._group.zero_()

    def _multiply(self, into: dict[str, list[torch.Tensor]]) -> None:
        """Some rows of the products at a time, for a whole one more would take half the room of the sums."""
        for kind, matrices in into.items():
            for part, matrix in zip(self._ranges, matrices, strict=True):
                first = 0 if kind == _DEFICIT else part.start
                for at in range(0, len(matrix), ROWS):
                    rows = slice(first + at, first + min(at + ROWS, len(matrix)))
                    product = torch.zeros(rows.stop - rows.start, matrix.shape[1], device=matrix.device)
                    for heard in self._pending:
                        left = (heard.x if kind == _HESSIAN else heard.other)[:, rows]
                        left = left if heard.weight is None else left * heard.weight
                        product.addmm_(left.T, heard.x[:, part])
                    matrix[at : at + len(product)] += product
        self._pending.clear()

    def part(self) -> dict[str, torch.Tensor]:
        """What was heard, as one group that was never closed: for `take` in another process. To be asked for once."""
        matrices = self._matrices(torch.float32) if self._ranges else {}
        self._multiply(matrices)
        found = {f"{kind}.{i}": m for kind, some in matrices.items() for i, m in enumerate(some)}
        return {**found, "absmax": self._absmax, "sizes": self._group, "tokens": torch.tensor(self.tokens)}

    def take(self, part: Mapping[str, torch.Tensor]) -> None:
        """Add a group that another process has heard, as `part` gives it."""
        if not len(part["absmax"]):
            return
        if not self._ranges:
            self._begin(len(part["absmax"]), part["absmax"].device)
        if f"{_DEFICIT}.0" in part:
            self._rows = len(part[f"{_DEFICIT}.0"])
        self._totals = self._totals or self._matrices(torch.float64)
        for kind, matrices in self._totals.items():
            for i, matrix in enumerate(matrices):
                matrix += part[f"{kind}.{i}"]
        self._absmax = torch.maximum(self._absmax, part["absmax"])
        self._sizes += part["sizes"]
        self.tokens += int(part["tokens"])

    def statistics(self) -> Statistics:
        """The result, to be asked for once; no tokens make a Hessian of zeros."""
        self.close()
        if not self._ranges:
            empty = torch.zeros(self._shape[-1], self._shape[-1])
            return Statistics(empty, None, 0)
        n = max(1, self.tokens)
        found = {kind: [m.div_(n).float() for m in some] for kind, some in self._totals.items()}
        self._totals = {}
        sizes, in_basis = (self._sizes / n).float(), self._wanted.basis is not None
        cross = _joined(found[_CROSS]) if _CROSS in found else None
        deficit = torch.cat(found[_DEFICIT], 1) if _DEFICIT in found else None
        known = (self.tokens, self._absmax, sizes, in_basis, deficit)
        return Statistics(_joined(found[_HESSIAN]), cross, *known)


def _joined(parts: list[torch.Tensor]) -> Moments:
    return parts[0] if len(parts) == 1 else BlockDiagonal(tuple(parts))
