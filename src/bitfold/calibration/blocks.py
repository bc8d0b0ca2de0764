"""Walk a model block by block, with the weights of one block in memory.

The inputs of the first block are caught once. Each block then exists twice for a while: as it was (its inputs come from
the original model) and as it is being quantized (its inputs come from the quantized blocks before). Inside a block the
layers are taken in the order in which they run, those that share an input together, so that every Hessian is
that of the inputs the layer will really see.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bitfold.errors import ModelError

Read = Callable[[str], torch.Tensor]
Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Stop(Exception):
    """Raised by a hook when the rest of a forward pass is not needed."""


@dataclass
class Statistics:
    """Second moments of the inputs of a group of layers, weighted by token.

    Args:
        hessian: (k, k) float32, sum of s x x^T over tokens, x from the quantized model.
        cross: (k, k) float32, sum of s f x^T, f the same inputs in the original model.
        tokens: how many were seen.
    """

    hessian: torch.Tensor
    cross: torch.Tensor
    tokens: int

    def target(self, w: torch.Tensor, strength: float, damp: float) -> torch.Tensor:
        """The weight that makes up for what the layers before have lost, part of the way (QEP, Qronos).

        (1 - a) W + a W C H^-1 is the least-squares solution of W f = W' x at a = 1.
        """
        if strength == 0:
            return w
        k = len(self.hessian)
        ridge = damp * self.hessian.diagonal().mean().double() * torch.eye(k, dtype=torch.float64)
        solved = torch.linalg.solve(self.hessian.double() + ridge, (self.cross.double() + ridge).T).T
        moved: torch.Tensor = (1 - strength) * w + strength * (w.double() @ solved).float()
        return moved


class BlockWalk:
    """The blocks of a transformer, one after the other.

    Args:
        model: the skeleton on the meta device; it is filled and emptied block by block.
        read: name of a tensor of the model -> the tensor.
        ids: token ids (samples, seqlen).
        weights: token weights (samples, seqlen) by layer name, or empty.

    Raises:
        ModelError: the model has no list of blocks.
    """

    def __init__(self, model: nn.Module, read: Read, ids: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> None:
        self.model, self._read, self._ids, self._weights = model, read, ids, weights
        self.path, self._blocks = _find_blocks(model)
        self._calls: list[Call] = []
        self._original: list[torch.Tensor] = []
        self._quantized: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self._blocks)

    @torch.no_grad()
    def start(self) -> None:
        """Fill what comes before the blocks and catch the inputs of the first one."""
        prefix = f"{self.path}."
        for name, parameter in list(self.model.named_parameters()):
            if not name.startswith(prefix) and parameter.is_meta:
                _set(self.model, name, self._read(name).float())
        first = self._blocks[0]
        handle = first.register_forward_pre_hook(self._catch, with_kwargs=True)
        try:
            for sample in self._ids:
                with contextlib.suppress(_Stop):
                    self.model(input_ids=sample[None], use_cache=False)
        finally:
            handle.remove()
        self._original = [args[0] for args, _ in self._calls]
        self._quantized = list(self._original)

    def _catch(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not args:
            args, kwargs = (kwargs["hidden_states"],), {k: v for k, v in kwargs.items() if k != "hidden_states"}
        self._calls.append((args, kwargs))
        raise _Stop

    @torch.no_grad()
    def block(self, index: int, layers: list[str]) -> Iterator[tuple[list[str], Statistics]]:
        """Load a block and yield its groups of layers with their statistics, in the order of their execution.

        The caller puts quantized weights into `model` before it asks for the next group. After the last group the
        outputs are passed on and the block is emptied.

        Args:
            index: of the block.
            layers: names of the linear layers of interest.
        """
        block, name = self._blocks[index], f"{self.path}.{index}"
        for parameter, _ in list(block.named_parameters()):
            _set(block, parameter, self._read(f"{name}.{parameter}").float())
        original = copy.deepcopy(block)
        inside = [layer.removeprefix(f"{name}.") for layer in layers]
        groups = _groups(block, inside, self._calls[0], self._original[0])
        kept, outputs = self._run_original(original, groups)
        for number, group in enumerate(groups):
            weight = self._weights.get(f"{name}.{group[0]}")
            yield [f"{name}.{layer}" for layer in group], self._measure(block, group[0], kept[number], weight)
        self._quantized = [_run(block, call, x) for call, x in zip(self._calls, self._quantized, strict=True)]
        self._original = outputs
        for parameter, value in list(block.named_parameters()):
            _set(block, parameter, value.to("meta"))

    def _run_original(
        self, block: nn.Module, groups: list[list[str]]
    ) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
        kept: list[list[torch.Tensor]] = [[] for _ in groups]
        handles = []
        for store, group in zip(kept, groups, strict=True):
            handles.append(block.get_submodule(group[0]).register_forward_pre_hook(_keeper(store)))
        outputs = [_run(block, call, x) for call, x in zip(self._calls, self._original, strict=True)]
        for handle in handles:
            handle.remove()
        return kept, outputs

    def _measure(
        self, block: nn.Module, layer: str, original: list[torch.Tensor], weight: torch.Tensor | None
    ) -> Statistics:
        found: list[torch.Tensor] = []

        def stop(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            found.append(inputs[0].reshape(-1, inputs[0].shape[-1]))
            raise _Stop

        handle = block.get_submodule(layer).register_forward_pre_hook(stop)
        hessian = cross = torch.zeros(1, 1)
        tokens = 0
        try:
            for i, (call, x) in enumerate(zip(self._calls, self._quantized, strict=True)):
                with contextlib.suppress(_Stop):
                    _run(block, call, x)
                seen = found.pop()
                weighted = seen if weight is None else seen * weight[i].reshape(-1, 1)
                hessian = hessian + weighted.T @ seen
                cross = cross + original[i].T @ weighted
                tokens += len(seen)
        finally:
            handle.remove()
        return Statistics(hessian / tokens, cross / tokens, tokens)


def _keeper(store: list[torch.Tensor]) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def keep(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        store.append(inputs[0].reshape(-1, inputs[0].shape[-1]))

    return keep


def _run(block: nn.Module, call: Call, x: torch.Tensor) -> torch.Tensor:
    args, kwargs = call
    out = block(x, *args[1:], **kwargs)
    first: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return first


def _groups(block: nn.Module, layers: list[str], call: Call, x: torch.Tensor) -> list[list[str]]:
    """Layers in the order of their execution, those with the very same input together, idle ones left out."""
    order: list[tuple[str, int]] = []
    alive: list[torch.Tensor] = []  # keeps the inputs, so that no two of them get the same address
    handles = []
    for layer in layers:

        def note(_module: nn.Module, inputs: tuple[torch.Tensor, ...], layer: str = layer) -> None:
            alive.append(inputs[0])
            order.append((layer, inputs[0].data_ptr()))

        handles.append(block.get_submodule(layer).register_forward_pre_hook(note))
    _run(block, call, x)
    for handle in handles:
        handle.remove()
    groups: dict[int, list[str]] = {}
    for layer, address in order:
        if not any(layer in group for group in groups.values()):
            groups.setdefault(address, []).append(layer)
    return list(groups.values())


def _find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The longest list of modules of one class: the decoder (or encoder) blocks."""
    best: tuple[str, nn.ModuleList] | None = None
    for path, module in model.named_modules():
        alike = isinstance(module, nn.ModuleList) and len({type(m) for m in module}) == 1
        if alike and (best is None or len(module) > len(best[1])):
            best = path, module
    if best is None:
        raise ModelError("has no list of blocks to calibrate one by one", where=type(model).__name__)
    return best


def _set(module: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    module.get_submodule(owner)._parameters[attribute] = nn.Parameter(value, requires_grad=False)
