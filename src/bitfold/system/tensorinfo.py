"""What is known of a tensor before it is in memory."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from bitfold.errors import UsageError


@dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint says of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor once read."""
        return self.numel * self.dtype.itemsize


def require_rows(index: torch.Tensor, rows: int, where: str | None = None) -> None:
    """UsageError for numbers of rows that a tensor of so many does not have: what lies beside it is not its own.

    Args:
        index: whole numbers; negative ones do not count from the end.
        rows: of the tensor.
        where: its name.
    """
    if index.numel() and not ((low := int(index.min())) >= 0 and (high := int(index.max())) < rows):
        raise UsageError(f"has no row {low if low < 0 else high}, it has {rows}", where=where)
