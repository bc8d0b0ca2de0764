"""What the blocks of a model are called with: activations, masks, rotary tables."""

from __future__ import annotations

from typing import Any

import torch

Call = tuple[tuple[Any, ...], dict[str, Any]]


def shared(args: tuple[Any, ...], kwargs: dict[str, Any], calls: list[Call]) -> Call:
    """A call, whose arguments are those of the call before where they are equal: masks and rotary tables mostly are."""
    if not calls:
        return args, kwargs
    before = calls[-1]
    same = tuple(_same(new, old) for new, old in zip(args[1:], before[0][1:], strict=False))
    return (*args[:1], *same, *args[1 + len(same) :]), {k: _same(v, before[1].get(k)) for k, v in kwargs.items()}


def _same(new: Any, old: Any) -> Any:
    """The old value where it equals the new one."""
    if isinstance(new, torch.Tensor) and isinstance(old, torch.Tensor):
        return old if new is old or (new.dtype == old.dtype and torch.equal(new, old)) else new
    if type(new) is tuple and type(old) is tuple and len(new) == len(old):
        return tuple(_same(a, b) for a, b in zip(new, old, strict=True))
    return new
