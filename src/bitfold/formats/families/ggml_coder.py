"""ggml's blocks under error feedback: scales, then codes column by column, then the scales that suit the codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitfold.formats import integers as rounding
from bitfold.formats.families.ggml_scales import Structure, joined, nearest

_CHUNK = 1 << 18  # weights whose scales are searched at a time


class GgmlCoder:
    """See `Coder`: every column by itself, its scales fixed beforehand.

    Args:
        block: weights of a block.
        structure: of its numbers.
        w: (n, k), float32.
        importance: float32 (k,) of the inputs, or None.
    """

    step = 1
    under = None

    def __init__(self, block: int, structure: Structure, w: Tensor, importance: Tensor | None) -> None:
        self._block, self._structure = block, structure
        parts, rows = [], max(1, _CHUNK // w.shape[1])
        for at in range(0, len(w), rows):
            some = w[at : at + rows]
            wide = None if importance is None else importance.expand_as(some).reshape(-1, block)
            parts.append(structure.fit(some.reshape(-1, block), wide))
        self._scales = joined(parts)
        n = len(w)
        self._scale = self._scales.scale.view(n, -1).T.contiguous()
        shift = self._scales.shift
        inverse = torch.where(self._scale == 0, 0.0, 1 / self._scale)
        self._zero = None if shift is None else (shift.view(n, -1).T * -inverse).contiguous()
        self._codes = torch.zeros(w.shape[1], n, dtype=torch.uint8)
        self.at_once = rounding.AT_ONCE if structure.even else 0

    def feed(self, columns: rounding.FeedbackColumns) -> None:
        """Code some columns, the errors of each fed to the next; only where `at_once` is not 0."""
        span = (float(self._structure.points[0]), float(self._structure.points[-1]))
        rounding.feed(columns, rounding.Scales(span, self._structure.sub, self._scale, self._zero), self._codes)

    def encode(self, w: Tensor, start: int) -> Tensor:
        """See `Coder`."""
        groups = torch.arange(start, start + w.shape[1]) // self._structure.sub
        scale = self._scale[groups]
        zero = 0.0 if self._zero is None else self._zero[groups]
        codes = nearest(w.T * torch.where(scale == 0, 0.0, 1 / scale) + zero, self._structure.points)
        self._codes[start : start + w.shape[1]] = codes.to(torch.uint8)
        points = torch.tensor(self._structure.points, dtype=torch.float32)
        return ((points[codes.long()] - zero) * scale).T

    def fields(self) -> dict[str, Tensor]:
        """See `Coder`."""
        codes = self._codes.T.reshape(-1, self._block).to(torch.int32)
        return {"blocks": self._structure.join(codes, self._scales).view(self._codes.shape[1], -1)}

    def refit(self, w: Tensor, times: Callable[[Tensor, slice], Tensor]) -> None:
        """See `Coder`: the half-precision numbers of each block, one block of columns after the other."""
        n, k = w.shape
        points = torch.tensor(self._structure.points, dtype=torch.float32)
        along = points[self._codes.T.long()]
        if self._scales.scale_codes is not None:
            along = along * self._scales.scale_codes.view(n, -1).repeat_interleave(self._structure.sub, 1)
        directions, numbers = [along], [self._scales.d.view(n, -1)]
        across = self._across(n, k)
        if across is not None and self._scales.low is not None:
            directions.append(across)
            numbers.append(self._scales.low.view(n, -1))
        refit_numbers(w, self._block, directions, numbers, times)

    def _across(self, n: int, k: int) -> Tensor | None:
        """What the second number of each block is multiplied by, (n, k)."""
        if self._scales.low is None:
            return None
        if self._scales.low_codes is None:
            return torch.ones(n, k)
        return -self._scales.low_codes.view(n, -1).repeat_interleave(self._structure.sub, 1)


def refit_numbers(
    w: Tensor, block: int, directions: list[Tensor], numbers: list[Tensor], times: Callable[[Tensor, slice], Tensor]
) -> None:
    """Choose the half-precision numbers of each block anew, in place, one block of columns after the other.

    Args:
        w: (n, k), what is aimed at.
        block: columns that share the numbers.
        directions: (n, k) each, what a number is multiplied by.
        numbers: (n, k / block) each.
        times: see `Coder.refit`.
    """
    error = w.clone()
    for direction, number in zip(directions, numbers, strict=True):
        error -= direction * number.repeat_interleave(block, 1)
    for i in range(w.shape[1] // block):
        part = slice(i * block, (i + 1) * block)
        here = [direction[:, part] for direction in directions]
        turned = [times(direction, part) for direction in here]
        changes = _best(here, turned, [number[:, i] for number in numbers], times(error, part))
        for number, change, direction in zip(numbers, changes, here, strict=True):
            number[:, i] += change
            error[:, part] -= change[:, None] * direction


def _best(directions: list[Tensor], turned: list[Tensor], numbers: list[Tensor], pull: Tensor) -> list[Tensor]:
    """What to add to the numbers of one block, (n,) each: least squares, rounded, where that is better than nothing.

    Args:
        directions: (n, c) each, what a number is multiplied by.
        turned: the same times the Hessian of the block.
        numbers: (n,) each, as they are.
        pull: (n, c), the errors of all columns times these columns of the Hessian.
    """
    square = torch.stack([torch.stack([(t * u).sum(1) for u in directions], 1) for t in turned], 1)  # (n, m, m)
    right = torch.stack([(pull * u).sum(1) for u in directions], 1)
    size = square.diagonal(dim1=1, dim2=2).clamp_min(1e-30)
    damped = square + torch.diag_embed(1e-6 * size + 1e-30)
    wanted = torch.linalg.solve(damped, right[..., None])[..., 0]
    new = [(x + step).to(torch.float16).float() for x, step in zip(numbers, wanted.unbind(1), strict=True)]
    steps = torch.stack([a - b for a, b in zip(new, numbers, strict=True)], 1)
    change = (steps[:, None] @ square @ steps[..., None])[:, 0, 0] - 2 * (steps * right).sum(1)
    good = torch.isfinite(change) & (change < 0)
    return list(torch.where(good[:, None], steps, 0.0).unbind(1))
