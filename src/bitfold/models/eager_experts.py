"""Mixtures of transformers, told to multiply by one expert after the other.

transformers multiplies all experts at once where it can. Packed weights, weights without values and whoever listens to
the tokens of each expert need them one by one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


def one_expert_at_a_time(module: nn.Module) -> None:
    """From now on, in a module and all that is in it."""
    for config in _configs(module):
        config._experts_implementation = "eager"


@contextlib.contextmanager
def eager_experts(module: nn.Module) -> Iterator[None]:
    """Within this context."""
    before = [(config, config._experts_implementation) for config in _configs(module)]
    try:
        one_expert_at_a_time(module)
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation


def _configs(module: nn.Module) -> list[Any]:
    """Those that say how experts are multiplied by, each once."""
    found = {id(c): c for m in module.modules() if (c := getattr(m, "config", None)) is not None}
    return [config for config in found.values() if hasattr(config, "_experts_implementation")]
