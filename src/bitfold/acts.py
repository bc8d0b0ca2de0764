"""How activations are treated at run time, by name.

    float          as they come
    int8           rounded to 8 bits for each token, as the data comes
    int8-mixed:T   LLM.int8(): columns of a batch in which some |x| >= T stay in floating point and meet the dequantized
                   columns of the weight; the rest is int8 (Dettmers et al. 2022, arXiv 2208.07339; T = 6.0)

The name is what recipes and checkpoints store.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitfold.errors import UsageError

THRESHOLD = 6.0
KNOWN = "float, int8 or int8-mixed:6.0"


@dataclass(frozen=True)
class Act:
    """A treatment of activations.

    Args:
        kernel: what kernels are asked for, "float" or "int8".
        threshold: magnitude from which on a column stays in floating point; None = no column does.
    """

    kernel: str
    threshold: float | None = None


def read_act(text: str) -> Act:
    """The treatment of that name.

    Raises:
        UsageError: unknown, or a threshold that is negative or no number.
    """
    kind, _, number = text.partition(":")
    if text in ("float", "int8"):
        return Act(text)
    if kind != "int8-mixed":
        raise UsageError(f"unknown activation type {text!r}", hint=KNOWN)
    try:
        threshold = float(number) if number or text.endswith(":") else THRESHOLD
    except ValueError:
        threshold = -1.0
    if not threshold >= 0:
        raise UsageError(f"{number!r} is no threshold for outliers", hint="a magnitude, as in int8-mixed:6.0")
    return Act("int8", threshold)
