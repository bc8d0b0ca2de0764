"""What looks wrong with a weight, or with what quantizing made of it."""

from __future__ import annotations

import math

import torch

from bitfold.formats import AnyFormat
from bitfold.methods.gaussian import sqnr_of
from bitfold.system.parallel import parallel_map

BELOW_DB, ABOVE_DB = 6.0, 6.0  # how far from the ratio on a Gaussian a tensor may be before it is worth a look
_KNOWN: dict[tuple[str, str], float | None] = {}
_PIECE = 1 << 20  # weights looked at by one job


def weight_flags(w: torch.Tensor, *, table: bool = False) -> list[str]:
    """What is odd about the numbers of a weight (..., n, k), inputs last: rows and columns of zeros only.

    A row of zeros is an output that never speaks, a column of zeros an input that nobody hears. In a table with a row
    for each word rows of zeros are ordinary: padding.
    """
    zeros = Zeros()
    for matrix in w.reshape(-1, *w.shape[-2:]):
        zeros.add(matrix)
        zeros.close()
    return zeros.flags(table=table)


class Zeros:
    """Counts the rows and columns of zeros of matrices that come in pieces of their rows."""

    def __init__(self) -> None:
        self._rows = self._columns = 0
        self._heard: torch.Tensor | None = None

    def add(self, part: torch.Tensor) -> None:
        """Some rows (n, k) of the matrix at hand."""
        step = max(1, _PIECE // max(1, part.shape[1]))
        found = parallel_map(_alive, [part[i : i + step] for i in range(0, len(part), step)])
        self._rows += sum(int((~alive).sum()) for alive, _ in found)
        heard = torch.stack([heard for _, heard in found]).any(0)
        self._heard = heard if self._heard is None else self._heard | heard

    def close(self) -> None:
        """The matrix is complete."""
        if self._heard is not None:
            self._columns += int((~self._heard).sum())
        self._heard = None

    def flags(self, *, table: bool = False) -> list[str]:
        """In words; rows of zeros are ordinary in a table with a row for each word."""
        self.close()
        found = [f"{self._rows} rows of zeros"] if self._rows and not table else []
        return found + ([f"{self._columns} columns of zeros"] if self._columns else [])


def _alive(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows and columns of a piece hold anything but zeros."""
    nonzero = part != 0
    return nonzero.any(1), nonzero.any(0)


def kept_flags(w: torch.Tensor) -> list[str]:
    """What is wrong with a tensor that is stored as it was."""
    if not w.is_floating_point():
        return []
    flat = w.reshape(-1)
    bad = sum(int((~torch.isfinite(flat[i : i + _PIECE])).sum()) for i in range(0, len(flat), _PIECE))
    return [f"{bad} numbers are NaN or infinite"] if bad else []


def error_flags(error: float, format: AnyFormat, fit: str, *, feedback: bool) -> list[str]:
    """Whether the relative square error of a weight is far from what the format does to Gaussian weights.

    Args:
        error: |w - wq|^2 / |w|^2 of the weight in the basis in which it was quantized.
        format, fit: how it was quantized.
        feedback: the solver spends error of the weight to save error of the output, so more of it is as it should be.
    """
    if not math.isfinite(error):
        return ["its error is not a number"]
    expected = gaussian_db(format, fit)
    if expected is None or math.isinf(expected):
        return ["not exact, although its format is"] if expected is not None and error > 0 else []
    found = -10 * math.log10(error) if error > 0 else math.inf
    if found < expected - BELOW_DB - (4.0 if feedback else 0.0):
        return [f"{found:.1f} dB, a Gaussian has {expected:.1f} dB in {format.name}"]
    if found > expected + ABOVE_DB:
        return [f"{found:.1f} dB, a Gaussian has only {expected:.1f} dB in {format.name}: few different values?"]
    return []


def gaussian_db(format: AnyFormat, fit: str) -> float | None:
    """Signal-to-noise ratio of the format on Gaussian weights; None where it cannot be measured."""
    key = (format.name, fit)
    if key not in _KNOWN:
        _KNOWN[key] = sqnr_of(format, fit)
    return _KNOWN[key]
