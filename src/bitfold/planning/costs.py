"""What each of several ways to store a tensor costs, in nats a token: what errors cost, times the errors made on trial.

What an error costs is known from an importance matrix with gradients; what error a format makes is tried on some rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bitfold.checkpoints.gguf.imatrix import Importance
from bitfold.errors import CheckpointError

Coder = Callable[[torch.Tensor], torch.Tensor]  # rows (n, k) float32 -> what is read back; None where nothing is lost
_ROWS = 32  # of a tensor on which formats are tried: a whole tile of trellis codes
_AT_ONCE = 1 << 24  # weights whose energy is summed at a time


def with_costs(entry: Importance | None, shape: tuple[int, ...], name: str) -> Importance:
    """The entry of a weight (n, k), or of a stack of experts (e, n, k), which counts as (e * n, k).

    Raises:
        CheckpointError: there is none, it has no costs, or is of another weight.
    """
    hint = "make one with `bitfold imatrix`, on this model, with gradients"
    if entry is None or entry.costs is None:
        raise CheckpointError("the importance matrix does not say what errors cost here", where=name, hint=hint)
    rows = 1
    for size in shape[:-1]:
        rows *= size
    if len(entry.costs) != shape[-1] or (entry.rows is not None and len(entry.rows) != rows):
        raise CheckpointError(f"the importance matrix is of a weight other than {shape}", where=name, hint=hint)
    return entry


def error_costs(w: torch.Tensor, entry: Importance, coders: Sequence[Coder | None]) -> list[float]:
    """Of each way to store a weight: the cost of all that it is, times the share that is wrong on some of its rows.

    Args:
        w: (n, k), any float dtype.
        entry: with costs, of this weight.
        coders: the ways; None = nothing is lost.
    """
    assert entry.costs is not None
    whole = 0.0
    for at in range(0, len(w), step := max(1, _AT_ONCE // w.shape[1])):
        energy = w[at : at + step].float().square() @ entry.costs
        whole += float(energy.sum() if entry.rows is None else energy @ entry.rows[at : at + step])
    some = some_rows(w)
    part = float((some.square() @ entry.costs).sum())
    wrong = [None if coder is None or part == 0 else coder(some) - some for coder in coders]
    return [0.0 if d is None else whole * float((d.square() @ entry.costs).sum()) / part for d in wrong]


def some_rows(w: torch.Tensor) -> torch.Tensor:
    """Rows from everywhere in a weight (n, k), float32."""
    return w[:: max(1, len(w) // _ROWS)][:_ROWS].float()
