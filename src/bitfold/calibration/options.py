"""How to calibrate, as a value."""

from __future__ import annotations

from dataclasses import dataclass

from bitfold.errors import UsageError
from bitfold.methods.hessian import ALIGNED
from bitfold.recipes.catalog import AUTO, find_method
from bitfold.text.tokens import BUNDLED

DRIFT = 0.75  # of the way, where nobody says; measured, docs/log.md


@dataclass(frozen=True)
class Calibration:
    """How to calibrate.

    Args:
        text: a file of text or data, "default", "code" or "dialogue" (which come with bitfold), "self" (the model
            writes it), the name of a data set of the Hub, or a mix; see `text.documents`, `text.mixes`.
        nsamples: windows of text.
        seqlen: tokens of a window; None = 2048, or what the model has positions for.
        drift: how far the target moves towards making up for the loss of the layers before, 0 to 1: in a layer's inputs
            and, where its output is added to what others have made, in that sum.
        fisher: weight tokens by the gradient of the loss; None = if the model is small enough to afford it.
        columns: inputs whose Hessian is kept whole; layers with more are solved in ranges of at most so many, which
            costs some accuracy and saves memory; None = whole, unless a ceiling of memory is named that needs this.
        refit: error feedback ends with the row scales that cost least under the Hessian.
        start_token: windows begin as the tokenizer begins a text.
    """

    text: str = BUNDLED
    nsamples: int = 32
    seqlen: int | None = None
    drift: float = DRIFT
    fisher: bool | None = None
    columns: int | None = None
    refit: bool = True
    start_token: bool = True

    def __post_init__(self) -> None:
        if self.nsamples < 1 or (self.seqlen is not None and self.seqlen < 2):
            raise UsageError("calibration needs at least one sample of two tokens")
        if not 0 <= self.drift <= 1:
            raise UsageError(f"a drift correction of {self.drift} makes no sense", hint="0 to 1")
        if self.columns is not None and self.columns < ALIGNED:
            raise UsageError(
                f"ranges of {self.columns} inputs are too narrow", where="--columns", hint=f"at least {ALIGNED}"
            )


def settings(
    method: str | None,
    text: str | None = None,
    nsamples: int = 32,
    seqlen: int | None = None,
    drift: float | None = None,
    fisher: bool | None = None,
    columns: int | None = None,
    refit: bool = True,
    start_token: bool = True,
) -> Calibration | None:
    """The calibration that options mean: None where no text is named and the method is known to need none."""
    found = None if method is None or method == AUTO else find_method(method)
    if text is None and found is not None and not found.needs_text:
        return None
    corrects = found is None or found.corrects
    strength = (DRIFT if corrects else 0.0) if drift is None else drift
    seqlen = seqlen or (found.seqlen if found is not None else None)
    weighed = fisher if corrects or fisher is not None else False
    return Calibration(text or BUNDLED, nsamples, seqlen, strength, weighed, columns, refit, start_token)
