"""Which axis of a stack of weights the inputs are on: found out from what the model does with it.

Some families hold their experts as (experts, outputs, inputs) and multiply by `linear`, others as (experts, inputs,
outputs) and by `bmm` or `@`; where both have one size, the shape does not tell. The model is run dry, and every product
with a stack or a slice of it, transposed on the way or not, says which axis it sums over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bitfold.models.dry_run import run_dry

_FLIPS = ("transpose", "swapaxes", "swapdims", "t", "adjoint", "permute", "movedim")
_SAME = ("to", "float", "half", "bfloat16", "type_as", "type", "contiguous", "clone", "detach", "index_select")
_PARTS = ("chunk", "split", "unbind", "tensor_split")
_RIGHT = ("matmul", "__matmul__", "mm", "bmm", "_grouped_mm", "grouped_mm")  # x @ w
_ADDED = ("addmm", "baddbmm", "addbmm")  # b + x @ w


class _AllSeen(Exception):
    """Raised when nothing is left to be found out."""


def inputs_second(model: nn.Module) -> dict[str, bool]:
    """Three-dimensional parameters by name: whether the inputs come before the outputs; without those not seen in use.

    Parameters of one class and attribute are alike: the run ends when each of them was seen once.
    """
    stacks = {f"{path}.{name}" if path else name: (type(m), name) for path, m, name in _stacks(model)}
    kinds = set(stacks.values())
    seen: dict[tuple[type, str], bool | None] = {}
    if not kinds:
        return {}
    tracker = _Tracker(seen, len(kinds))
    with contextlib.suppress(Exception):  # enough was seen, or no more can be: the caller judges the rest otherwise
        run_dry(model, tracker.note, begin=lambda trial: tracker.follow(trial, stacks))
    return {name: flipped for name, kind in stacks.items() if (flipped := seen.get(kind)) is not None}


def _stacks(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    convolutions = (nn.modules.conv._ConvNd, nn.Bilinear)
    return [
        (path, m, name)
        for path, m in model.named_modules()
        if not isinstance(m, convolutions)
        for name, p in m._parameters.items()
        if p is not None and p.dim() == 3
    ]


class _Tracker:
    """Follows stacks through slices and transposes to the products they are used in."""

    def __init__(self, seen: dict[Any, bool | None], kinds: int) -> None:
        self._known: dict[int, tuple[Any, bool]] = {}  # by tensor: which stack, whether flipped
        self._seen, self._kinds = seen, kinds
        self._alive: list[torch.Tensor] = []  # so that no two get the same id

    def follow(self, trial: nn.Module, stacks: Mapping[str, Any]) -> None:
        """The stacks of the model that is run, by name."""
        self._known = {id(trial.get_parameter(name)): (kind, False) for name, kind in stacks.items()}

    def note(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """One operation."""
        name = getattr(func, "__name__", "")
        args = [*args, *kwargs.values()]
        if id(args[0]) in self._known:
            self._follow(func, name, args, out)
        if func is F.linear:
            self._used(args[1], last=True)
        elif name in _RIGHT or name in _ADDED:
            left, right = args[1:3] if name in _ADDED else args[:2]
            self._used(left, last=True)
            self._used(right, last=False)
        elif name == "einsum":
            self._einsum(args)

    def _follow(self, func: Any, name: str, args: Sequence[Any], out: Any) -> None:
        kind, flipped = self._known[id(args[0])]
        if name in _FLIPS or func in (torch.Tensor.T.__get__, torch.Tensor.mT.__get__):  # type: ignore[attr-defined]
            last = out.stride() != args[0].stride() or out.shape != args[0].shape
            self._keep(out, kind, flipped != last)
        elif name in _PARTS:
            for part in out:
                self._keep(part, kind, flipped)
        elif name in _SAME or name == "__getitem__" or (name == "__get__" and isinstance(out, torch.Tensor)):
            self._keep(out, kind, flipped)

    def _keep(self, tensor: Any, kind: Any, flipped: bool) -> None:
        if isinstance(tensor, torch.Tensor) and tensor.dim() in (2, 3) and id(tensor) not in self._known:
            self._alive.append(tensor)
            self._known[id(tensor)] = kind, flipped

    def _used(self, tensor: Any, *, last: bool) -> None:
        """A product that sums over the last axis of what it was given, or over the one before."""
        if id(tensor) not in self._known:
            return
        kind, flipped = self._known[id(tensor)]
        second = flipped == last
        self._seen[kind] = second if self._seen.get(kind, second) == second else None  # both: cannot be told
        if len(self._seen) == self._kinds:
            raise _AllSeen

    def _einsum(self, args: Sequence[Any]) -> None:
        terms, _, result = str(args[0]).replace(" ", "").partition("->")
        operands = list(args[1]) if isinstance(args[1], (list, tuple)) else list(args[1:])
        for letters, tensor in zip(terms.split(","), operands, strict=False):
            if len(letters) >= 2 and (letters[-1] in result) != (letters[-2] in result):
                self._used(tensor, last=letters[-1] not in result)
