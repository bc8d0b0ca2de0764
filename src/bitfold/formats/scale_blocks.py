"""Blocks: the sub-matrices that share one scale, as a view with the block's elements in the last dimension."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Block = tuple[int, int]


@dataclass(frozen=True)
class Blocks:
    """How an (n, k) matrix falls into blocks of (rows, cols); 0 stands for all rows or all columns.

    The last block of a row (column) is shorter when the size does not divide; it is padded with zeros in `split`.
    """

    n: int
    k: int
    block: Block

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return min(self.block[0], self.n) or self.n

    @property
    def cols(self) -> int:
        """Columns of a block."""
        return min(self.block[1], self.k) or self.k

    @property
    def grid(self) -> tuple[int, int]:
        """Number of blocks down and across."""
        return math.ceil(self.n / self.rows), math.ceil(self.k / self.cols)

    @property
    def padded(self) -> bool:
        """Whether some blocks are shorter than the others."""
        return self.n % self.rows != 0 or self.k % self.cols != 0

    def split(self, w: torch.Tensor) -> torch.Tensor:
        """(n, k) -> (blocks down, blocks across, elements of a block)."""
        down, across = self.grid
        if self.padded:
            w = F.pad(w, (0, across * self.cols - self.k, 0, down * self.rows - self.n))
        view = w.reshape(down, self.rows, across, self.cols)
        return view.permute(0, 2, 1, 3).reshape(down, across, self.rows * self.cols)

    def join(self, blocks: torch.Tensor) -> torch.Tensor:
        """Inverse of `split`: the padding is dropped."""
        down, across = self.grid
        view = blocks.reshape(down, across, self.rows, self.cols).permute(0, 2, 1, 3)
        return view.reshape(down * self.rows, across * self.cols)[: self.n, : self.k]

    def mask(self, device: torch.device) -> torch.Tensor | None:
        """float32 ones on real elements and zeros on padding, in the shape of `split`; None without padding."""
        if not self.padded:
            return None
        return self.split(torch.ones(self.n, self.k, device=device))
