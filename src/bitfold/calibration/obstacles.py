"""What stands in the way of calibrating a model, found out before anything is read."""

from __future__ import annotations

from torch import nn

from bitfold.calibration.shape import WalkShape, walk_shape
from bitfold.checkpoints import Source
from bitfold.errors import CheckpointError
from bitfold.system.memory import available
from bitfold.system.units import size_text

_COPIES = 4  # of a block in float32: its weights, their targets, errors, and what is solved


def why_not_calibrated(source: Source, model: nn.Module | None) -> str | None:
    """What stands in the way of running the model on text, in words; None if nothing does."""
    shape = walk_shape(model)
    if shape.obstacle is not None or model is None:
        return shape.obstacle
    if (fault := _without_tokenizer(source)) is not None:
        return fault
    what, needed = _needed(model, shape)
    free = available()
    if free is not None and needed > free:
        return f"{what} takes {size_text(needed)} to calibrate, {size_text(free)} are free"
    return None


def _needed(model: nn.Module, shape: WalkShape) -> tuple[str, int]:
    """What has to be in memory, and its bytes."""
    if not shape.chains:
        why = next((f" ({why})" for _, why in shape.unwalkable), "")
        return f"the whole model, which cannot be walked block by block{why},", 4 * _numel(model)
    return "a block of the model", max(_COPIES * 4 * _numel(model.get_submodule(b.path)) for b in shape.blocks)


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _without_tokenizer(source: Source) -> str | None:
    """Why text cannot be turned into tokens; None if it can."""
    try:
        source.tokenizer()
    except CheckpointError as error:
        return error.what
    return None
