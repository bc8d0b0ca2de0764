"""Coding a weight column by column, for solvers that feed the error of each column to the ones that follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

from bitfold.formats import integers as rounding

if TYPE_CHECKING:
    from bitfold.formats.base import Format, Params


class Coder(Protocol):
    """Takes the columns of one weight from left to right, scales fixed beforehand.

    `at_once`: how many columns it codes together, the errors of each fed to the next, by `feed`; 0 = it cannot.
    """

    @property
    def step(self) -> int: ...
    @property
    def at_once(self) -> int: ...
    @property
    def feed(self) -> Callable[[rounding.FeedbackColumns], None] | None: ...
    @property
    def under(self) -> Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor] | None:
        """Like `encode`, (w (n, c), start, metric (c, c)): an error e of these columns costs e metric e^T; None:
        it takes all errors for alike."""
        ...

    @property
    def refit(self) -> Callable[[torch.Tensor, Callable[[torch.Tensor, slice], torch.Tensor]], None] | None:
        """Choose anew, once all columns are coded, the numbers that several columns share; None: it cannot.

        (w (n, k), times): times(x, columns) is x H[:, columns] of an x (n, k), and x H[columns, columns] of one that
        has no more than these columns.
        """
        ...

    def encode(self, w: torch.Tensor, start: int) -> torch.Tensor:
        """Code the columns w (n, c) that begin at column `start`; returns what they decode to, float32 (n, c).

        c is `step` or `at_once`, or what is left of the row.
        """
        ...

    def fields(self) -> dict[str, torch.Tensor]:
        """The fields of the whole weight, once all columns are coded."""
        ...


class GridCoder:
    """Columns of a grid format, one at a time, each weight by itself.

    Args:
        format: the format.
        shape: of the weight, (n, k).
        params: real-valued scales; None for formats without.
        device: of the columns.
    """

    step = 1
    under = refit = None

    def __init__(self, format: Format, shape: tuple[int, int], params: Params | None, device: torch.device) -> None:
        self._format, self._shape = format, shape
        self._stored = {} if params is None else format.store_params(params)
        # Transposed: a column lies together.
        self._codes = torch.zeros(shape[1], shape[0], dtype=torch.uint8, device=device)
        blocks = format.blocks(shape)
        self._cols, rows = blocks.cols, torch.arange(shape[0], device=device) // blocks.rows
        self._scale = self._inverse = self._zero = None  # of each block across and each row
        stored = format.load_params(self._stored, shape)
        if stored is not None:
            self._scale = stored.scale[rows].T.contiguous()
            self._inverse = torch.where(self._scale == 0, 0.0, 1.0 / self._scale)
            self._zero = None if stored.zero_point is None else stored.zero_point[rows].T.contiguous()
        self.at_once = rounding.AT_ONCE if format.grid.uniform and self._scale is not None else 0

    def feed(self, columns: rounding.FeedbackColumns) -> None:
        """Code some columns, the errors of each fed to the next; only where `at_once` is not 0."""
        assert self._scale is not None
        span = self._format.grid.span
        rounding.feed(columns, rounding.Scales(span, self._cols, self._scale, self._zero), self._codes)

    def _of_columns(self, per_block: torch.Tensor, start: int, count: int) -> torch.Tensor:
        """(count, n), or (1, n) where all columns are of one block."""
        first, last = start // self._cols, (start + count - 1) // self._cols
        if first == last:
            return per_block[first : first + 1]
        return per_block[torch.arange(start, start + count, device=per_block.device) // self._cols]

    def encode(self, w: torch.Tensor, start: int) -> torch.Tensor:
        """See `Coder`."""
        grid, count = self._format.grid, w.shape[1]
        x = w.T
        if self._inverse is not None:
            x = x * self._of_columns(self._inverse, start, count)
        zero = None if self._zero is None else self._of_columns(self._zero, start, count)
        codes = grid.encode(x if zero is None else x.add_(zero))
        self._codes[start : start + count] = codes
        found = grid.decode(codes)
        if zero is not None:
            found.sub_(zero)
        if self._scale is not None:
            found.mul_(self._of_columns(self._scale, start, count))
        return found.T

    def fields(self) -> dict[str, torch.Tensor]:
        """See `Coder`."""
        return {"codes": self._format.grid.pack(self._codes.T.contiguous()), **self._stored}
