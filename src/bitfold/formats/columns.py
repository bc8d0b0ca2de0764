"""Coding a weight column by column, for solvers that feed the error of each column to the ones that follow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from bitfold.formats.base import Format, Params


class Coder(Protocol):
    """Takes the columns of one weight from left to right, scales fixed beforehand."""

    step: int

    def encode(self, w: torch.Tensor, start: int) -> torch.Tensor:
        """Code the columns w (n, c) that begin at column `start`; returns what they decode to, float32 (n, c).

        c is `step`, or what is left of the row.
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
    """

    step = 1

    def __init__(self, format: Format, shape: tuple[int, int], params: Params | None) -> None:
        self._format, self._shape = format, shape
        self._stored = {} if params is None else format.store_params(params)
        self._params = format.load_params(self._stored, shape)
        self._codes = torch.zeros(shape, dtype=torch.uint8)
        blocks = format.blocks(shape)
        self._rows, self._cols = torch.arange(shape[0]) // blocks.rows, blocks.cols

    def _of_columns(self, per_block: torch.Tensor, start: int, count: int) -> torch.Tensor:
        columns = torch.arange(start, start + count) // self._cols
        return per_block[self._rows[:, None], columns]

    def encode(self, w: torch.Tensor, start: int) -> torch.Tensor:
        """See `Coder`."""
        grid, params, count = self._format.grid, self._params, w.shape[1]
        if params is None:
            codes = grid.encode(w)
            self._codes[:, start : start + count] = codes
            return grid.decode(codes)
        scale = self._of_columns(params.scale, start, count)
        scaled = w * torch.where(scale == 0, 0.0, 1.0 / scale)
        zero = None if params.zero_point is None else self._of_columns(params.zero_point, start, count)
        codes = grid.encode(scaled if zero is None else scaled + zero)
        self._codes[:, start : start + count] = codes
        points = grid.decode(codes)
        return (points if zero is None else points - zero) * scale

    def fields(self) -> dict[str, torch.Tensor]:
        """See `Coder`."""
        return {"codes": self._format.grid.pack(self._codes), **self._stored}
