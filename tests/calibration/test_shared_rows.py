"""Rows of layers that several processes code: everyone has the pieces that one alone has."""

from __future__ import annotations

import pytest
import torch

from bitfold.calibration.shared_rows import cut
from bitfold.formats import FORMATS
from bitfold.methods.gptq import row_pieces

_CODED = [name for name, format in FORMATS.items() if format.coder is not None]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", _CODED)
def test_pieces_of_a_part_are_pieces_of_the_whole(name: str, threads: int) -> None:
    """Rows that are multiplied together round together: other pieces would make other bytes."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = torch.zeros(1, 1).expand(5000, 8192)  # more than the weights that are coded at a time
        pieces = row_pieces(FORMATS[name], whole)
        assert [row for rows in pieces for row in range(5000)[rows]] == list(range(5000))
        for workers in (1, 2, 3, 7, 100):
            found = []
            for first, stop in cut(pieces, workers):
                part = row_pieces(FORMATS[name], whole[first:stop])
                found += [slice(first + rows.start, first + rows.stop) for rows in part]
            assert found == pieces
    finally:
        torch.set_num_threads(before)
