"""Which method, where nobody says: by bits, by whether the model can be calibrated, by memory.

Eight to five bits lose little whatever is done, so they are rounded to nearest. From four bits down the method decides,
and trellis codes on rotated inputs lose least of all that is here (docs/methods.md); calibrated where that can be done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bitfold.errors import UsageError

_EASY = 5  # bits from which on rounding to nearest is enough


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Args:
        method: its name.
        options: of the recipe: this method, or what of it can be done.
        why: in a sentence.
    """

    method: str
    options: dict[str, str | None]
    why: str


def choose(bits: int | None, why_not: Callable[[], str | None], *, tokens: int) -> Choice:
    """The method for so many bits of a checkpoint.

    Args:
        bits: 1 to 8.
        why_not: asked where it matters: what stands in the way of calibration, in words; None if nothing does.
        tokens: of calibration text that a calibrated method would use.

    Raises:
        UsageError: no number of bits to go by.
    """
    if bits is None:
        raise UsageError("which method is best depends on the bits", where="--method auto", hint="say --bits 4")
    if bits >= _EASY:
        return Choice("rtn", {"method": "rtn"}, f"{bits} bits lose little without calibration")
    obstacle = why_not()
    if obstacle is not None:
        options = {"method": "rtn", "bits": None, "format": f"trellis-{bits}", "transform": "hadamard"}
        return Choice("trellis", options, f"trellis codes on rotated inputs, without calibration: {obstacle}")
    return Choice(
        "trellis",
        {"method": "trellis"},
        f"least loss at {bits} bits; calibrated on {tokens} tokens",
    )
