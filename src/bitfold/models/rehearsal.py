"""Whether a quantized model will run, tried before it is made."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bitfold.checkpoints.schema import Entry
from bitfold.models.dry_run import run_dry
from bitfold.models.swap import swap_entries


def rehearse(model: nn.Module, entries: Mapping[str, Entry]) -> str | None:
    """What would go wrong when the quantized model is run, in words; None where nothing is known to.

    The original is run first: where that cannot be rehearsed, nothing is said.

    Args:
        model: the skeleton on the meta device; it is left as it is.
        entries: what is to be quantized.
    """
    try:
        expected = _shapes(run_dry(model))
    except Exception:
        return None
    trial = copy.deepcopy(model)
    try:
        swap_entries(trial, entries)
        found = _shapes(run_dry(trial))
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"the quantized model would not run: {first}"
    if found != expected:
        return f"the quantized model would answer in the shapes {found}, the original in {expected}"
    return None


def _shapes(output: Any) -> list[tuple[int, ...]]:
    """Of the tensors of an output, caches aside."""
    values = output.values() if isinstance(output, Mapping) else output
    return [tuple(v.shape) for v in values if isinstance(v, torch.Tensor)]
