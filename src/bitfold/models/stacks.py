"""Which axis of a stack of weights the inputs are on, and how many weights it has: seen in what a model does with it.

Some families hold their experts as (experts, outputs, inputs) and multiply by `linear`, others as (experts, inputs,
outputs) and by `bmm` or `@`; where both have one size, the shape does not tell. DBRX holds them one upon the other, in
the rows of a matrix that it views as a stack. The model is run dry, and every product with a stack or a slice of it,
transposed on the way or not, says which axis it sums over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
UNSTACKED = ("view", "reshape", "unflatten")  # (experts * rows, columns) -> (experts, rows, columns)
_PLAIN = (nn.Linear, nn.Embedding, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)


@dataclass(frozen=True)
class Stack:
    """How a model uses a stack of weights.

    Args:
        inputs_second: each is (inputs, outputs), and not (outputs, inputs).
        experts: how many lie one upon the other in the rows of a matrix; None where the tensor has an axis for them.
    """

    inputs_second: bool
    experts: int | None = None


class _AllSeen(Exception):
    """Raised when nothing is left to be found out."""


def find_stacks(model: nn.Module) -> dict[str, Stack]:
    """Parameters that hold several weights, by name; without those not seen in use.

    Parameters of one class and attribute are alike: the run ends when each of them was seen once.
    """
    stacks = {f"{path}.{name}" if path else name: (type(m), name) for path, m, name in _stacks(model)}
    kinds = set(stacks.values())
    seen: dict[tuple[type, str], Stack | None] = {}
    if not kinds:
        return {}
    tracker = _Tracker(seen, len(kinds))
    with contextlib.suppress(Exception):  # enough was seen, or no more can be: the caller judges the rest otherwise
        run_dry(model, tracker.note, begin=lambda trial: tracker.follow(trial, stacks))
    used = {name: found for name, kind in stacks.items() if (found := seen.get(kind)) is not None}
    return {n: s for n, s in used.items() if s.experts is not None or model.get_parameter(n).dim() == 3}


def _stacks(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Tensors with three axes, and matrices of modules that keep their experts."""
    return [
        (path, m, name)
        for path, m in model.named_modules()
        if not isinstance(m, _PLAIN)
        for name, p in m._parameters.items()
        if p is not None and (p.dim() == 3 or (p.dim() == 2 and _of_experts(path, m, name)))
    ]


def _of_experts(path: str, module: nn.Module, name: str) -> bool:
    return "expert" in f"{path}.{type(module).__name__}".lower() and not name.endswith("bias")


class _Tracker:
    """Follows stacks through slices and transposes to the products they are used in."""

    def __init__(self, seen: dict[Any, Stack | None], kinds: int) -> None:
        self._known: dict[int, tuple[Any, bool, int | None]] = {}  # by tensor: which, flipped or not, experts in rows
        self._seen, self._kinds = seen, kinds
        self._alive: list[torch.Tensor] = []  # so that no two get the same id

    def follow(self, trial: nn.Module, stacks: Mapping[str, Any]) -> None:
        """The stacks of the model that is run, by name."""
        self._known = {id(trial.get_parameter(name)): (kind, False, None) for name, kind in stacks.items()}

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
        kind, flipped, experts = self._known[id(args[0])]
        if name in UNSTACKED and args[0].dim() == 2 and out.dim() == 3 and out.shape[2] == args[0].shape[1]:
            self._keep(out, kind, flipped, out.shape[0])
        elif name in _FLIPS or func in (torch.Tensor.T.__get__, torch.Tensor.mT.__get__):  # type: ignore[attr-defined]
            last = out.stride() != args[0].stride() or out.shape != args[0].shape
            self._keep(out, kind, flipped != last, experts)
        elif name in _PARTS:
            for part in out:
                self._keep(part, kind, flipped, experts)
        elif name in _SAME or name == "__getitem__" or (name == "__get__" and isinstance(out, torch.Tensor)):
            self._keep(out, kind, flipped, experts)

    def _keep(self, tensor: Any, kind: Any, flipped: bool, experts: int | None) -> None:
        if isinstance(tensor, torch.Tensor) and tensor.dim() in (2, 3) and id(tensor) not in self._known:
            self._alive.append(tensor)
            self._known[id(tensor)] = kind, flipped, experts

    def _used(self, tensor: Any, *, last: bool) -> None:
        """A product that sums over the last axis of what it was given, or over the one before."""
        if id(tensor) not in self._known:
            return
        kind, flipped, experts = self._known[id(tensor)]
        found = Stack(flipped == last, experts)
        self._seen[kind] = found if self._seen.get(kind, found) == found else None  # both: cannot be told
        if len(self._seen) == self._kinds:
            raise _AllSeen

    def _einsum(self, args: Sequence[Any]) -> None:
        terms, _, result = str(args[0]).replace(" ", "").partition("->")
        operands = list(args[1]) if isinstance(args[1], (list, tuple)) else list(args[1:])
        for letters, tensor in zip(terms.split(","), operands, strict=False):
            if len(letters) >= 2 and (letters[-1] in result) != (letters[-2] in result):
                self._used(tensor, last=letters[-1] not in result)
