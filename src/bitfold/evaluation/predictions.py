"""The reference's predictions, kept on disk so that it need not be in memory beside the model that is judged.

A row is a distribution over the vocabulary. It is stored as one 16-bit number for each entry: how far its
log-probability lies below that of the most likely entry, in steps of 40 / 65534 nats; the last code stands for
everything more than 40 nats below, whose probability is less than 5e-18 of the largest. Rounding moves a
log-probability by at most 3e-4 nats; read back and normalised, a distribution has KL divergence step^2 / 24 = 1.6e-8
nats from the one written, which is the floor of the measurement (half-precision log-probabilities would put it near
1e-5). The most likely entry keeps code 0 to itself, so that top-1 agreement is exact.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from bitfold.errors import CheckpointError, UsageError

RANGE = 40.0
STEP = RANGE / 65534
_BELOW = 65535
_SHIFT = 32768  # torch computes with int16, not with uint16
PIECE = 256  # rows at a time: temporaries stay small beside the logits of a window


class Predictions(Protocol):
    """Distributions over the vocabulary for the scored positions of a window."""

    def rows(self, window: int, start: int, stop: int) -> torch.Tensor:
        """float32 log-probabilities (stop - start, vocabulary); positions are counted within the window."""
        ...


def pack_rows(logits: torch.Tensor) -> torch.Tensor:
    """int16 codes of the rows of float32 logits or log-probabilities (rows, vocabulary)."""
    top, best = logits.max(-1, keepdim=True)
    steps = (top - logits).mul_(1 / STEP).round_().clamp_(1, _BELOW)
    steps.scatter_(-1, best, 0.0)
    return steps.sub_(_SHIFT).to(torch.int16)


def unpack_rows(codes: torch.Tensor) -> torch.Tensor:
    """float32 log-probabilities of int16 codes; -inf for what was too unlikely to store."""
    logits = codes.float().add_(_SHIFT).mul_(-STEP)
    below = _BELOW - _SHIFT
    if int(codes.max()) == below:  # rare: most logits span less than 40 nats, and the comparison costs a pass
        logits.masked_fill_(codes == below, -torch.inf)
    return torch.log_softmax(logits, -1)


class DiskPredictions:
    """Codes of all windows, one after the other, in a file.

    Args:
        path: the file.
        vocabulary: entries of a row.
        origins: for each window, the row of the file at which its position 0 would be.
    """

    def __init__(self, path: Path, vocabulary: int, origins: list[int]) -> None:
        self.path, self.vocabulary, self.origins = path, vocabulary, origins

    def rows(self, window: int, start: int, stop: int) -> torch.Tensor:
        """See `Predictions`."""
        first = self.origins[window] + start
        count = (stop - start) * self.vocabulary
        codes = np.fromfile(self.path, dtype="<i2", count=count, offset=2 * first * self.vocabulary)
        if codes.size != count:
            raise CheckpointError("the stored predictions are truncated", where=str(self.path), hint="delete the file")
        return unpack_rows(torch.from_numpy(codes.astype(np.int16, copy=False)).reshape(-1, self.vocabulary))


class Writer:
    """Appends rows to a file that becomes visible under its name only when it is whole."""

    def __init__(self, path: Path, total_rows: int) -> None:
        self.path, self.total_rows = path, total_rows
        self.partial = path.with_name(path.name + ".partial")
        self._file = self.partial.open("wb")
        self._checked = False

    def append(self, logits: torch.Tensor) -> None:
        """Write rows of float32 logits (rows, vocabulary).

        Raises:
            UsageError: the disk has no room for all rows; found out before the first is written.
        """
        if not self._checked:
            _require_space(self.path, 2 * self.total_rows * int(logits.shape[-1]))
            self._checked = True
        self._file.write(pack_rows(logits).numpy().astype("<i2", copy=False).tobytes())

    def close(self, *, complete: bool) -> None:
        """Give the file its name, or remove it."""
        self._file.close()
        if complete:
            self.partial.replace(self.path)
        else:
            self.partial.unlink(missing_ok=True)


def _require_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise UsageError(
            f"the reference's predictions take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            where=str(path.parent),
            hint="evaluate fewer tokens (--max-tokens), or name a folder on a larger disk (--cache-dir)",
        )
