"""Pruning: which weights become zero.

    wanda:0.5, wanda:2:4          the smallest |w| sqrt(H_jj) of each row, or of each four in a row, chosen beforehand
                                  (Sun et al. 2023, arXiv 2306.11695)
    sparsegpt:0.5, sparsegpt:2:4  the least (w R_jj)^2, w already corrected for what was pruned and rounded before,
                                  block by block of columns; the solver feeds their errors forward like those of
                                  rounding
                                  (Frantar and Alistarh 2023, arXiv 2301.00774)

H is the second moment of the inputs and R its triangular factor (see gptq.py): (w R_jj)^2 is what zeroing w costs once
the columns after it have made up for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from bitfold.errors import UsageError

BLOCK = 128  # columns that SparseGPT decides on at a time


@dataclass(frozen=True)
class Sparsity:
    """How much becomes zero, and who decides.

    Args:
        kind: "wanda" or "sparsegpt".
        ratio: share of zeros.
        group: of so many consecutive weights in a row the share is zero, exactly; 0 = anywhere.
    """

    kind: str
    ratio: float
    group: int = 0

    @property
    def on_the_way(self) -> bool:
        """Whether a solver that feeds errors forward decides, as it goes."""
        return self.kind == "sparsegpt"

    def mask(self, scores: torch.Tensor, *, by_row: bool) -> torch.Tensor:
        """bool (n, c), True = kept: the weights of the lowest scores go.

        Args:
            scores: (n, c).
            by_row: the same share of each row; otherwise of all scores together. Groups go before both.
        """
        n, c = scores.shape
        if self.group:
            whole = c // self.group * self.group
            kept = torch.ones(n, c, dtype=torch.bool)
            kept[:, :whole] = _largest(scores[:, :whole].reshape(-1, self.group), self.ratio).view(n, whole)
            return kept
        return _largest(scores, self.ratio) if by_row else _largest(scores.reshape(1, -1), self.ratio).view(n, c)


def _largest(scores: torch.Tensor, ratio: float) -> torch.Tensor:
    """All but the lowest share of each row; of equal scores the first go."""
    count = round(ratio * scores.shape[1])
    kept = torch.ones_like(scores, dtype=torch.bool)
    lowest = scores.argsort(dim=1, stable=True)[:, :count]
    return kept.scatter_(1, lowest, False)


def read_sparsity(text: str) -> Sparsity | None:
    """`none`, `wanda:RATIO`, `sparsegpt:RATIO`, or either with `N:M`: N of M consecutive weights stay.

    Raises:
        UsageError: anything else.
    """
    if text == "none":
        return None
    kind, _, rest = text.partition(":")
    try:
        if ":" in rest:
            kept, group = (int(part) for part in rest.split(":"))
            found = Sparsity(kind, 1 - kept / group, group)
        else:
            found = Sparsity(kind, float(rest or 0.5))
    except (ValueError, ZeroDivisionError):
        found = Sparsity("", 0.0)
    if found.kind not in ("wanda", "sparsegpt") or not 0 < found.ratio < 1 or found.group > BLOCK:
        hint = "wanda or sparsegpt, with a share of zeros or N:M, as in wanda:0.5 or sparsegpt:2:4"
        raise UsageError(f"unknown pruning {text!r}", hint=hint)
    return found


class Pruner(Protocol):
    """Tells a solver with feedback which weights of a few columns stay."""

    @property
    def span(self) -> int: ...
    @property
    def group(self) -> int: ...
    def mask(self, columns: torch.Tensor, aim: torch.Tensor, pivots: torch.Tensor) -> torch.Tensor:
        """bool (n, c).

        Args:
            columns: (c,) their places in the weight.
            aim: (n, c) what they should be, errors so far fed forward.
            pivots: (c,) their diagonal entries of R.
        """
        ...


@dataclass(frozen=True)
class Fixed:
    """A mask chosen beforehand: bool (n, k)."""

    kept: torch.Tensor
    span = BLOCK
    group = 0

    def mask(self, columns: torch.Tensor, aim: torch.Tensor, pivots: torch.Tensor) -> torch.Tensor:
        """See `Pruner`."""
        return self.kept[:, columns]


@dataclass(frozen=True)
class SparseGPT:
    """A mask chosen as the solver goes."""

    sparsity: Sparsity

    @property
    def span(self) -> int:
        """Columns decided on at a time."""
        return self.sparsity.group or BLOCK

    @property
    def group(self) -> int:
        """Columns that must stay together."""
        return self.sparsity.group

    def mask(self, columns: torch.Tensor, aim: torch.Tensor, pivots: torch.Tensor) -> torch.Tensor:
        """See `Pruner`."""
        return self.sparsity.mask((aim * pivots).square(), by_row=False)


def wanda_mask(w: torch.Tensor, second_moment: torch.Tensor | None, sparsity: Sparsity) -> torch.Tensor:
    """bool (n, k), True = kept.

    Args:
        w: (n, k).
        second_moment: (k,) mean square of each input; None = all alike, which is pruning by magnitude.
        sparsity: how much.
    """
    norm = 1.0 if second_moment is None else second_moment.clamp_min(0).sqrt()
    return sparsity.mask(w.abs() * norm, by_row=True)
