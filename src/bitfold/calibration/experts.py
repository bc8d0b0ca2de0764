"""Stacks of experts: which tokens each expert of a stack is multiplied with.

Mixture models keep the experts of a block in one tensor (experts, n, k) and multiply by one slice at a time, with the
tokens that were sent there. No module is called for it, so the torch functions themselves are listened to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from bitfold.models.stacks import UNSTACKED

Heard = Callable[[str, int, torch.Tensor], None]
_FLIPS = ("t", "transpose", "swapaxes")
_TURNED: tuple[Any, ...] = (torch.Tensor.T.__get__, torch.Tensor.mT.__get__)  # type: ignore[attr-defined]
_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)


class Listener(TorchFunctionMode):
    """Hears every product with an expert of some stacks, once for all of them together or slice by slice.

    Args:
        block: the module that holds them.
        stacks: names of their parameters in it: (experts, ..), or matrices (experts * n, k) that it views as such.
        heard: called with the name, the number of the expert and its inputs (tokens, k).
    """

    def __init__(self, block: nn.Module, stacks: Sequence[str], heard: Heard) -> None:
        super().__init__()
        self._stacks = {id(block.get_parameter(name)): name for name in stacks}
        self._slices: dict[int, tuple[str, int]] = {}
        self._alive: list[torch.Tensor] = []  # so that no two slices get the same id
        self._heard = heard

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if args and id(args[0]) in self._stacks:
            self._part(name, args, out)
        elif args and id(args[0]) in self._slices and (name in _FLIPS or func in _TURNED):
            self._keep(self._slices, out, self._slices[id(args[0])])
        elif (func is F.linear or func in _PRODUCTS) and len(args) > 1 and id(args[1]) in self._slices:
            name, expert = self._slices[id(args[1])]
            self._heard(name, expert, args[0].reshape(-1, args[0].shape[-1]))
        elif func in (torch.bmm, torch.Tensor.bmm) and id(args[1]) in self._stacks:
            for expert, x in enumerate(args[0]):
                self._heard(self._stacks[id(args[1])], expert, x)
        return out

    def _part(self, name: str, args: Sequence[Any], out: Any) -> None:
        """An expert of a stack, all of them, or the stack that a matrix of experts is viewed as."""
        stack = self._stacks[id(args[0])]
        if name == "__getitem__" and out.dim() == 2 and args[0].dim() == 3:
            self._keep(self._slices, out, (stack, int(args[1])))
        elif name == "unbind" and args[0].dim() == 3 and args[1:] in ((), (0,)):
            for expert, part in enumerate(out):
                self._keep(self._slices, part, (stack, expert))
        elif name in UNSTACKED and out.dim() == 3 and args[0].dim() == 2:
            self._keep(self._stacks, out, stack)

    def _keep(self, known: dict[int, Any], tensor: torch.Tensor, what: Any) -> None:
        known[id(tensor)] = what
        self._alive.append(tensor)
