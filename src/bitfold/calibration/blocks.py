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
from typing import Any, Protocol

import torch
from torch import nn

from bitfold.errors import ModelError

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Tensors(Protocol):
    """Tensors of a model by name."""

    def read(self, name: str) -> torch.Tensor: ...
    def __contains__(self, name: object) -> bool: ...


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

        (1 - a) W + a W C H^-1 is the least-squares solution of W f = W' x at a = 1; C and H are damped alike.

        Args:
            w: (n, k) float32.
            strength: a, 0 to 1.
            damp: added to both diagonals, as a share of the mean diagonal of H.
        """
        mean = float(self.hessian.diagonal().mean())
        if strength == 0 or mean == 0:  # nothing ever reaches a layer whose inputs are all zero
            return w
        damped = self.hessian.double()
        damped.diagonal().add_(damp * mean)
        lost = (w @ (self.cross - self.hessian)).double()  # W C - W H: the ridge is on both sides
        moved: torch.Tensor = w + strength * torch.cholesky_solve(lost.T, torch.linalg.cholesky(damped)).T.float()
        return moved


class BlockWalk:
    """The blocks of a transformer, one after the other.

    Args:
        model: the skeleton on the meta device; it is filled and emptied block by block.
        source: the tensors of the model by name.
        ids: token ids (samples, seqlen).
        weights: token weights (samples, seqlen) by layer name, or empty.

    Raises:
        ModelError: the model has no list of blocks.
    """

    def __init__(
        self, model: nn.Module, source: Tensors, ids: torch.Tensor, weights: Mapping[str, torch.Tensor]
    ) -> None:
        self.model, self._source, self._ids, self._weights = model, source, ids, weights
        self.path, self._blocks = _find_blocks(model)
        self._calls: list[list[Call]] = []  # for each block, for each sample
        self._original: list[torch.Tensor] = []
        self._quantized: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self._blocks)

    @torch.no_grad()
    def start(self) -> None:
        """Fill what comes before the blocks and catch what every block is called with.

        Masks and rotary embeddings may differ from block to block (sliding windows), so all blocks are called, with
        their work left out: each hands on what it was given.
        """
        self._fill("", skip=f"{self.path}.")
        for answer in (lambda hidden: hidden, lambda hidden: (hidden,)):
            self._calls = [[] for _ in self._blocks]
            with self._catching(answer), contextlib.suppress(IndexError, RuntimeError, TypeError, ValueError):
                for sample in self._ids:
                    self.model(input_ids=sample[None], use_cache=False)
            if self._all_called():
                break
        else:
            raise ModelError("its blocks are not called one after the other", where=type(self.model).__name__)
        self._original = [args[0] for args, _ in self._calls[0]]
        self._quantized = list(self._original)

    def _all_called(self) -> bool:
        first = [tuple(args[0].shape) for args, _ in self._calls[0]]
        alike = all([tuple(args[0].shape) for args, _ in calls] == first for calls in self._calls)
        return alike and len(first) == len(self._ids)

    @contextlib.contextmanager
    def _catching(self, answer: Callable[[torch.Tensor], Any]) -> Iterator[None]:
        def caught(calls: list[Call]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if not args:
                    args, kwargs = (kwargs["hidden_states"],), {k: v for k, v in kwargs.items() if k != "hidden_states"}
                calls.append((args, kwargs))
                return answer(args[0])

            return forward

        try:
            for block, calls in zip(self._blocks, self._calls, strict=True):
                block.__dict__["forward"] = caught(calls)
            yield
        finally:
            for block in self._blocks:
                block.__dict__.pop("forward", None)

    def _fill(self, prefix: str, *, skip: str | None = None) -> None:
        """Give the tensors below a prefix their values, float32."""
        module = self.model.get_submodule(prefix.rstrip("."))
        for kind in (module.named_parameters(), module.named_buffers()):
            for name, old in list(kind):
                full = prefix + name
                if (skip is None or not full.startswith(skip)) and (old.is_meta or full in self._source):
                    value = self._source.read(full)
                    _set(self.model, full, value.float() if value.is_floating_point() else value)

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
        self._fill(f"{name}.")
        calls = self._calls[index]
        original = copy.deepcopy(block)
        inside = [layer.removeprefix(f"{name}.") for layer in layers]
        groups = _groups(block, inside, calls[0], self._original[0])
        kept, outputs = self._run_original(original, groups, calls)
        finished = _Finished(block, groups, len(calls))
        for number, group in enumerate(groups):
            finished.replay(number)
            full = [f"{name}.{layer}" for layer in group]
            weights = [self._weights[layer] for layer in full if layer in self._weights]
            weight = torch.stack(weights).mean(0) if weights else None
            yield full, self._measure(block, group[0], kept[number], weight, calls)
        finished.replay(len(groups))
        self._quantized = [_run(block, call, x) for call, x in zip(calls, self._quantized, strict=True)]
        finished.forget()
        self._original = outputs
        for parameter, value in list(block.named_parameters()):
            _set(block, parameter, value.to("meta"))

    def _run_original(
        self, block: nn.Module, groups: list[list[str]], calls: list[Call]
    ) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
        kept: list[list[torch.Tensor]] = [[] for _ in groups]
        handles = []
        for store, group in zip(kept, groups, strict=True):
            handles.append(block.get_submodule(group[0]).register_forward_pre_hook(_keeper(store)))
        outputs = [_run(block, call, x) for call, x in zip(calls, self._original, strict=True)]
        for handle in handles:
            handle.remove()
        return kept, outputs

    def _measure(
        self, block: nn.Module, layer: str, original: list[torch.Tensor], weight: torch.Tensor | None, calls: list[Call]
    ) -> Statistics:
        found: list[torch.Tensor] = []

        def stop(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            found.append(inputs[0].reshape(-1, inputs[0].shape[-1]))
            raise _Stop

        handle = block.get_submodule(layer).register_forward_pre_hook(stop)
        hessian = cross = torch.zeros(1, 1)
        tokens = 0
        try:
            for i, (call, x) in enumerate(zip(calls, self._quantized, strict=True)):
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


class _Finished:
    """Parts of a block (its attention, say) whose layers are all quantized: run once more, then answered from memory.

    Samples always come in the same order, so an answer is found by counting.

    Args:
        block: the block.
        groups: its groups of layers, in the order in which they are quantized.
        samples: how many there are.
    """

    def __init__(self, block: nn.Module, groups: list[list[str]], samples: int) -> None:
        last = {layer.split(".")[0]: number for number, group in enumerate(groups) for layer in group if "." in layer}
        self._parts = {part: block.get_submodule(part) for part in last}
        self._ready = {part: number + 1 for part, number in last.items()}
        self._outputs: dict[str, list[Any]] = {part: [] for part in last}
        self._samples = samples

    def replay(self, groups: int) -> None:
        """Before each pass over the samples, with that many groups quantized."""
        self.forget()
        for part, child in self._parts.items():
            outputs = self._outputs[part]
            if groups >= self._ready[part]:
                # Called more than once a sample, or cut short: never answered from memory.
                complete = len(outputs) == self._samples
                child.__dict__["forward"] = _player(outputs) if complete else _recorder(child.forward, outputs)

    def forget(self) -> None:
        """Run everything for real again."""
        for part, child in self._parts.items():
            child.__dict__.pop("forward", None)
            if len(self._outputs[part]) != self._samples:
                self._outputs[part].clear()


def _recorder(forward: Callable[..., Any], outputs: list[Any]) -> Callable[..., Any]:
    def record(*args: Any, **kwargs: Any) -> Any:
        outputs.append(forward(*args, **kwargs))
        return outputs[-1]

    return record


def _player(outputs: list[Any]) -> Callable[..., Any]:
    following = iter(outputs)
    return lambda *_args, **_kwargs: next(following)


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
    holder = module.get_submodule(owner)
    if attribute in holder._buffers:
        holder._buffers[attribute] = value
    else:
        holder._parameters[attribute] = nn.Parameter(value, requires_grad=False)
