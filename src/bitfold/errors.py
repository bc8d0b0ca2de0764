"""The one exception family of bitfold.

Every error says what happened, where (tensor, file, flag) and what to do about it; the command line prints exactly
that and ends with the error's exit code, never a traceback.
"""

from __future__ import annotations


class BitfoldError(Exception):
    """Base of every error that bitfold raises on purpose.

    Args:
        what: one sentence: what happened.
        where: the tensor, file, flag or repository concerned, as the user knows it.
        hint: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what = what
        self.where = where
        self.hint = hint
        super().__init__(what)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text} ({self.hint})" if self.hint else text


class UsageError(BitfoldError, ValueError):
    """An argument or flag that cannot be used: unknown name, wrong range, options that exclude each other."""

    exit_code = 2


class PackingError(UsageError):
    """Codes that cannot be packed or bytes that cannot be unpacked: out of range, float input, wrong length."""


class FormatError(UsageError):
    """An unknown number format, or a tensor that a format cannot hold."""


class RecipeError(UsageError):
    """A recipe that cannot be read or names something unknown."""


class CheckpointError(BitfoldError):
    """A checkpoint that cannot be read or written: truncated, missing, inconsistent, refused."""

    exit_code = 3


class ModelError(BitfoldError):
    """A model that cannot be built, or whose tensors do not match its checkpoint."""

    exit_code = 4


class WeightError(BitfoldError):
    """Weights that cannot be quantized: NaN, infinity, an empty tensor."""

    exit_code = 5


class HubError(BitfoldError):
    """The Hugging Face Hub refused, failed or could not be reached."""

    exit_code = 6


class QualityError(BitfoldError):
    """A measured loss above the limit that the caller set."""

    exit_code = 7


class AccountingError(BitfoldError):
    """Tensors or bytes that do not add up, hashes that do not agree, flagged tensors where the caller forbids them."""

    exit_code = 8


class ResourceError(BitfoldError):
    """A ceiling of memory, or the room on a disk, within which the work cannot be done."""

    exit_code = 9
