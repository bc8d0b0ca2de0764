"""What a run does when calibration fails: the next best thing, a line about it, and the true exception kept."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any

from bitfold.calibration.tensors import DamagedError
from bitfold.errors import AccountingError, BitfoldError, CheckpointError, HubError, ResourceError, UsageError

# Not failures of calibration: the machine, the files or the request are at fault, and going on would not mend them.
_FINAL = (MemoryError, OSError, AccountingError, CheckpointError, DamagedError, HubError, ResourceError, UsageError)
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # torch raises RuntimeError for it


@dataclass(frozen=True)
class Fallback:
    """Something was not calibrated.

    Args:
        where: what failed: a layer, a list of blocks, the token weights.
        instead: what is done instead, in words.
        error: why.
    """

    where: str
    instead: str
    error: Exception

    @property
    def why(self) -> str:
        """In a sentence."""
        return self.error.what if isinstance(self.error, BitfoldError) else sentence(self.error)

    def line(self) -> str:
        """For the user."""
        return f"{self.where} cannot be calibrated ({self.why}): {self.instead}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, for the events and the record of a run: with the exception as it was."""
        trace = "".join(traceback.format_exception(self.error))
        return {"where": self.where, "instead": self.instead, "why": self.why, "exception": trace}


def recoverable(error: Exception) -> Exception:
    """The error, if a run can do without what failed; raises it if not."""
    says = str(error).lower()
    if isinstance(error, _FINAL) or (isinstance(error, RuntimeError) and any(text in says for text in _OUT_OF_MEMORY)):
        raise error
    return error


def sentence(error: BaseException) -> str:
    """The first line of what an exception says, with its type."""
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
