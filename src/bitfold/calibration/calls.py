"""What the blocks of a model are called with besides their activations: masks, rotary tables, inputs of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

Place = int | str  # of the activations among the arguments: a position, or a name
Call = tuple[tuple[Any, ...], dict[str, Any]]  # the activations themselves are None


def without(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: Place) -> tuple[torch.Tensor, Call]:
    """The activations of a call, and the rest of it."""
    if isinstance(place, int):
        return args[place], ((*args[:place], None, *args[place + 1 :]), dict(kwargs))
    return kwargs[place], (args, {**kwargs, place: None})


def with_activations(call: Call, place: Place, x: torch.Tensor) -> Call:
    """A call, whole again."""
    args, kwargs = call
    if isinstance(place, int):
        return (*args[:place], x, *args[place + 1 :]), kwargs
    return args, {**kwargs, place: x}


def moved(value: Any, device: torch.device) -> Any:
    """A call, or what is in it, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(v, device) for key, v in value.items()}
    return type(value)(moved(v, device) for v in value) if type(value) in (tuple, list) else value


def shared(call: Call, calls: list[Call]) -> Call:
    """A call, whose arguments are those of the call before where they are equal: masks and rotary tables mostly are."""
    if not calls:
        return call
    (args, kwargs), before = call, calls[-1]
    same = tuple(_same(new, old) for new, old in zip(args, before[0], strict=False))
    return (*same, *args[len(same) :]), {k: _same(v, before[1].get(k)) for k, v in kwargs.items()}


def _same(new: Any, old: Any) -> Any:
    """The old value where it equals the new one."""
    if isinstance(new, torch.Tensor) and isinstance(old, torch.Tensor):
        return old if new is old or (new.dtype == old.dtype and torch.equal(new, old)) else new
    if type(new) is tuple and type(old) is tuple and len(new) == len(old):
        return tuple(_same(a, b) for a, b in zip(new, old, strict=True))
    return new
