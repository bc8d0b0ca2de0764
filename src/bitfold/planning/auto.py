"""Which method, where nobody says: by bits, by whether the model can be calibrated, by memory.

Eight to five bits lose little whatever is done, so they are rounded to nearest. From four bits down the method decides,
and trellis codes on rotated inputs lose least of all that is here (docs/methods.md); calibrated where that can be done.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from bitfold.checkpoints import Source
from bitfold.errors import CheckpointError, UsageError
from bitfold.system.memory import available

_EASY = 5  # bits from which on rounding to nearest is enough
_COPIES = 4  # of a block in float32: its weights, their targets, errors, and what is solved


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


def choose(bits: int | None, source: Source, model: nn.Module | None, *, tokens: int) -> Choice:
    """The method for so many bits of this checkpoint.

    Args:
        bits: 1 to 8.
        source: the open checkpoint.
        model: its skeleton; None = transformers does not have the class.
        tokens: of calibration text that a calibrated method would use.

    Raises:
        UsageError: no number of bits to go by.
    """
    if bits is None:
        raise UsageError("which method is best depends on the bits", where="--method auto", hint="say --bits 4")
    if bits >= _EASY:
        return Choice("rtn", {"method": "rtn"}, f"{bits} bits lose little without calibration")
    obstacle = why_not_calibrated(source, model)
    if obstacle is not None or model is None:
        options = {"method": "rtn", "bits": None, "format": f"trellis-{bits}", "transform": "hadamard"}
        return Choice("trellis", options, f"trellis codes on rotated inputs, without calibration: {obstacle}")
    return Choice(
        "trellis",
        {"method": "trellis"},
        f"least loss at {bits} bits; calibrated on {tokens} tokens",
    )


def why_not_calibrated(source: Source, model: nn.Module | None) -> str | None:
    """What stands in the way of running the model on text, in words; None if nothing does."""
    if model is None:
        return "transformers does not have the model's class"
    if not causal(model):
        return f"{type(model).__name__} is no causal language model"
    if (fault := _without_tokenizer(source)) is not None:
        return fault
    free, needed = available(), _COPIES * 4 * _largest_block(model)
    if free is not None and needed > free:
        return f"a block of the model takes {needed >> 20} MiB to calibrate, {free >> 20} MiB are free"
    return None


def _without_tokenizer(source: Source) -> str | None:
    """Why text cannot be turned into tokens; None if it can."""
    try:
        source.tokenizer()
    except CheckpointError as error:
        return error.what
    return None


def causal(model: nn.Module) -> bool:
    """Whether a model of transformers predicts the next token."""
    return "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__


def _largest_block(model: nn.Module) -> int:
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList))
    return max((sum(p.numel() for p in block.parameters()) for blocks in lists for block in blocks), default=0)
