"""Second moments of the inputs of a layer: a matrix (k, k), or only some squares on its diagonal.

The matrix takes 4 k^2 bytes in float32, and factoring it three times that again. Where this is too much, the inputs
are taken in ranges and what one range has to do with another is left out: each range of columns is then solved as if
it were a layer of its own, whose output is a part of the sum. Errors of one range are not made up for in another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

ALIGNED = 256  # columns: a multiple of every tile, and of the groups that there usually are


@dataclass(frozen=True)
class BlockDiagonal:
    """Squares on the diagonal of a symmetric matrix.

    Args:
        parts: (k_i, k_i) each, from the top left.
    """

    parts: tuple[torch.Tensor, ...]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def diagonal(self) -> torch.Tensor:
        """(k,)."""
        return torch.cat([part.diagonal() for part in self.parts])


Moments = torch.Tensor | BlockDiagonal


def diagonal_blocks(moments: Moments) -> list[tuple[slice, torch.Tensor]]:
    """What is known, each part with the columns that it is about; a whole matrix is one part."""
    if isinstance(moments, torch.Tensor):
        return [(slice(0, len(moments)), moments)]
    ends = [0]
    for part in moments.parts:
        ends.append(ends[-1] + len(part))
    return [(slice(a, b), part) for a, b, part in zip(ends, ends[1:], moments.parts, strict=False)]


def product(x: torch.Tensor, moments: Moments) -> torch.Tensor:
    """x (m, k) times the matrix, zeros where nothing is known: (m, k)."""
    if isinstance(moments, torch.Tensor):
        return x @ moments.to(x.dtype)
    return torch.cat([x[:, columns] @ part.to(x.dtype) for columns, part in diagonal_blocks(moments)], 1)


def product_columns(x: torch.Tensor, moments: Moments, columns: slice) -> torch.Tensor:
    """x H[:, columns] of an x (m, k); x H[columns, columns] of one (m, columns). Columns of one known square."""
    whole = x.shape[1] == len(moments)
    for known, part in diagonal_blocks(moments):
        if known.start <= columns.start and columns.stop <= known.stop:
            here = slice(columns.start - known.start, columns.stop - known.start)
            return x[:, known] @ part[:, here].to(x.dtype) if whole else x @ part[here, here].to(x.dtype)
    raise ValueError(f"{columns} are not within one of the squares")


def widest(moments: Moments) -> int:
    """Inputs of the largest part."""
    return max((len(part) for _, part in diagonal_blocks(moments)), default=0)


def column_ranges(k: int, largest: int | None) -> list[slice]:
    """Ranges of about the same width that k columns are taken in: at most `largest` each, whole multiples of 256."""
    if largest is None or k <= largest:
        return [slice(0, k)]
    step = math.ceil(k / math.ceil(k / largest) / ALIGNED) * ALIGNED
    step = min(step, max(ALIGNED, largest // ALIGNED * ALIGNED))
    return [slice(at, min(at + step, k)) for at in range(0, k, step)]
