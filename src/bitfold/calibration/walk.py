"""Walk a model block by block, with the weights of one block in memory.

The inputs of the first block are caught once. Each block then exists twice for a while: as it was (its inputs come from
the original model; left out where nothing is compared with it) and as it is being quantized (its inputs come from the
quantized blocks before). Inside a block the
layers are taken in the order in which they run, those that share an input together, so that every Hessian is
that of the inputs the layer will really see.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from bitfold.calibration.calls import Call, shared
from bitfold.calibration.embedded import Filled
from bitfold.calibration.experts import Listener, one_at_a_time
from bitfold.calibration.finished import AnswerReplay
from bitfold.calibration.probe import ActivationCost, Probe, Rounding
from bitfold.calibration.spill import Keyed, Spill, Stream
from bitfold.calibration.statistics import Statistics, Sums, TuningBlock, Wanted
from bitfold.errors import ModelError
from bitfold.nn import set_tensor

HESSIANS = 2 << 30  # bytes of the Hessians of experts in memory at a time, where there is room
Tuner = Callable[[str, TuningBlock], None]
# What a model raises when its blocks answer with a tensor where it unpacks a tuple, or the other way round.
_MISFITS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)


class Tensors(Protocol):
    """Tensors of a model by name."""

    def read(self, name: str) -> torch.Tensor: ...
    def __contains__(self, name: object) -> bool: ...


class _Stop(Exception):
    """Raised by a hook when the rest of a forward pass is not needed."""


class BlockWalk:
    """The blocks of a transformer, one after the other.

    Args:
        model: the skeleton on the meta device; it is filled and emptied block by block.
        source: the tensors of the model by name.
        ids: token ids (samples, seqlen).
        weights: token weights (samples, seqlen) by layer name, or empty.
        spill: where activations wait for their turn; default: in memory.
        hessian_bytes: bytes of the Hessians of experts in memory at a time.

    Raises:
        ModelError: the model has no list of blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Tensors,
        ids: torch.Tensor,
        weights: Mapping[str, torch.Tensor],
        spill: Spill | None = None,
        hessian_bytes: int = HESSIANS,
    ) -> None:
        self._hessian_bytes = hessian_bytes
        self.model, self._source, self._ids, self._weights = model, source, ids, weights
        self._spill = spill or Spill()
        self.path, self._blocks = find_blocks(model)
        self._calls: list[list[Call]] = []  # for each block, for each sample
        self._original = self._quantized = Stream()
        self._compared = True
        self._probe: Probe | None = None
        self._rounding: Callable[[str], Rounding] = lambda _layer: lambda x: x

    def __len__(self) -> int:
        return len(self._blocks)

    @torch.no_grad()
    def start(self) -> None:
        """Fill what comes before the blocks and catch what every block is called with.

        Masks and rotary embeddings may differ from block to block (sliding windows), so all blocks are called, with
        their work left out: each hands on what it was given.
        """
        one_at_a_time(self.model)
        for answer in (lambda hidden: hidden, lambda hidden: (hidden,)):
            self._calls = [[] for _ in self._blocks]
            self._original = self._quantized = self._spill.stream("original-0")
            with (
                Filled(self.model, self._source, self._ids, skip=f"{self.path}."),
                self._catching(answer, self._calls, self._original),
                contextlib.suppress(IndexError, RuntimeError, TypeError, ValueError),
            ):
                for sample in self._ids:
                    with contextlib.suppress(_Stop):
                        self.model(input_ids=sample[None], use_cache=False)
            if self._all_called():
                break
        else:
            raise ModelError("its blocks are not called one after the other", where=type(self.model).__name__)

    @property
    def streams(self) -> dict[str, Stream]:
        """What enters the next block, in the original model, the quantized one and, if watched, with rounded inputs."""
        found = {"quantized": self._quantized}
        if self._compared:
            found["original"] = self._original
        return found if self._probe is None else {**found, "rounded": self._probe.hidden}

    def enter(self, streams: Mapping[str, Stream]) -> None:
        """Go on with a later block, after `start` and `watch`: the activations that enter it are these."""
        self._quantized = streams["quantized"]
        self._original = streams.get("original", self._quantized)
        if self._probe is not None:
            self._probe.hidden = streams["rounded"]

    def forget_original(self) -> None:
        """Nothing will be compared with the original model, after `start`: its blocks are not run."""
        self._compared = False

    def watch(self, rounding: Callable[[str], Rounding]) -> None:
        """Measure 8-bit activations on the way, after `start`: `rounding` says what a layer's input goes through."""
        self._probe, self._rounding = Probe(self._quantized, self._spill.stream("rounded-0")), rounding

    def acts(self, retie: Callable[[nn.Module], None]) -> ActivationCost:
        """What they cost, after the last block; `watch` must have been called.

        Args:
            retie: gives an output layer that shares the embedding its values; each name has its own parameter here.
        """
        assert self._probe is not None
        self._fill("", skip=f"{self.path}.")
        retie(self.model)
        try:
            return self._probe.measure(self._original, self._quantized, self._tail)
        finally:
            self._empty("", skip=f"{self.path}.")

    @torch.no_grad()
    def _tail(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (tokens, vocabulary) of the last block's output (1, tokens, width): the blocks themselves left out."""
        for answer in (lambda _: hidden, lambda _: (hidden,)):
            with self._catching(answer), contextlib.suppress(*_MISFITS):
                logits: torch.Tensor = self.model(input_ids=self._ids[:1, : hidden.shape[1]], use_cache=False).logits
                return logits[0]
        raise ModelError("its output layer cannot be run by itself", where=type(self.model).__name__)

    def _all_called(self) -> bool:
        first = [tuple(args[0].shape) for args, _ in self._calls[0]]
        alike = all([tuple(args[0].shape) for args, _ in calls] == first for calls in self._calls)
        return alike and len(first) == len(self._ids)

    @contextlib.contextmanager
    def _catching(
        self,
        answer: Callable[[torch.Tensor], Any],
        into: list[list[Call]] | None = None,
        stream: Stream | None = None,
    ) -> Iterator[None]:
        """Every block answers at once; what it was called with goes into `into`, the first one's inputs into `stream`.

        With `into`, what follows the last block is not run.
        """

        def caught(calls: list[Call]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if not args:
                    args, kwargs = (kwargs["hidden_states"],), {k: v for k, v in kwargs.items() if k != "hidden_states"}
                if into is None:
                    return answer(args[0])
                if calls is into[0] and stream is not None:
                    stream.append(args[0])
                calls.append(shared((args[0].to("meta"), *args[1:]), kwargs, calls))
                if calls is into[-1]:
                    raise _Stop
                return answer(args[0])

            return forward

        try:
            for block, calls in zip(self._blocks, into or [[] for _ in self._blocks], strict=True):
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
                    set_tensor(self.model, full, value.float() if value.is_floating_point() else value)

    def _empty(self, prefix: str, *, skip: str | None = None) -> None:
        """Back to the meta device with the parameters below a prefix."""
        for name, value in list(self.model.named_parameters(remove_duplicate=False)):
            if name.startswith(prefix) and (skip is None or not name.startswith(skip)):
                set_tensor(self.model, name, value.to("meta"))

    @torch.no_grad()
    def block(
        self,
        index: int,
        layers: list[str],
        stacks: Sequence[str] = (),
        tuner: Tuner | None = None,
        wanted: Callable[[str], Wanted] = lambda _layer: Wanted(),
    ) -> Iterator[tuple[list[str], Iterable[Statistics]]]:
        """Load a block and yield its groups of layers with their statistics, in the order of their execution.

        The caller puts quantized weights into `model` before it asks for the next group. After the last group the
        outputs are passed on and the block is emptied.

        Args:
            index: of the block.
            layers: names of the linear layers of interest.
            stacks: names of tensors (experts, ..) of interest; each is a group of its own, with one statistics for each
                expert instead of one for all.
            tuner: called with the block after the last group, to tune other layers of it together.
            wanted: what is to be known of the inputs of a layer, by its name.
        """
        block, name = self._blocks[index], f"{self.path}.{index}"
        self._fill(f"{name}.")
        calls = self._calls[index]
        inside, stacked = ([n.removeprefix(f"{name}.") for n in names] for names in (layers, stacks))
        groups = self._groups(block, inside, stacked, calls)
        kept, outputs = self._run_original(index, groups, calls) if self._compared else ([], self._quantized)
        finished = AnswerReplay(block, groups, len(calls), self._spill)
        for number, group in enumerate(groups):
            finished.replay(number)
            full = [f"{name}.{layer}" for layer in group]
            if group[0] in stacked:
                yield full, self._measure_experts(block, group[0], calls)
                continue
            weights = [self._weights[layer] for layer in full if layer in self._weights]
            weight = torch.stack(weights).mean(0) if weights else None
            sums = Sums(block.get_parameter(f"{group[0]}.weight").shape, wanted(full[0]))
            original = kept[number] if kept else None
            yield full, [self._measure(block, group[0], original, weight, calls, sums)]
        if tuner is not None:
            finished.close()
            run = partial(_run_of, block, calls)
            tuner(name, TuningBlock(block, run, self._quantized, outputs))
        finished.replay(len(groups))
        quantized = self._spill.stream(f"quantized-{index + 1}")
        for call, x in zip(calls, self._quantized, strict=True):
            quantized.append(_run(block, call, x))
        finished.close()
        if self._probe is not None:
            rounding = {layer: self._rounding(f"{name}.{layer}") for layer in inside}
            into = self._spill.stream(f"rounded-{index + 1}")
            self._probe.advance(block, rounding, lambda i, x: _run(block, calls[i], x), into)
        for store in kept:
            store.drop()
        self._original, self._quantized = outputs if self._compared else quantized, quantized
        self._empty(f"{name}.")

    def _run_original(self, index: int, groups: list[list[str]], calls: list[Call]) -> tuple[list[Keyed], Stream]:
        """Inputs of each group by sample, and outputs, of the block as it was: nothing in it is quantized yet."""
        block, handles = self._blocks[index], []
        kept = [Keyed(self._spill.scratch()) for _ in groups]
        outputs = self._spill.stream(f"original-{index + 1}")
        for store, group in zip(kept, groups, strict=True):
            if isinstance(found := _member(block, group[0]), nn.Module):
                handles.append(found.register_forward_pre_hook(_keeper(store, outputs)))
        for call, x in zip(calls, self._original, strict=True):
            outputs.append(_run(block, call, x))
        for handle in handles:
            handle.remove()
        return kept, outputs

    def _groups(self, block: nn.Module, layers: list[str], stacks: list[str], calls: list[Call]) -> list[list[str]]:
        """Layers in the order of their execution, those with the very same input together, idle ones left out.

        One sample is enough unless tokens are sent to some layers only.
        """
        order: list[tuple[str, int]] = []
        alive: list[torch.Tensor] = []  # keeps the inputs, so that no two of them get the same address

        def note(name: str, x: torch.Tensor) -> None:
            alive.append(x)
            order.append((name, x.data_ptr() if name in layers else -len(order) - 1))

        handles = [block.get_submodule(layer).register_forward_pre_hook(_noter(note, layer)) for layer in layers]
        with Listener(block, stacks, lambda name, _expert, x: note(name, x)):
            for call, x in zip(calls, self._original, strict=True):
                _run(block, call, x)
                if {name for name, _ in order}.issuperset([*layers, *stacks]):
                    break
        for handle in handles:
            handle.remove()
        groups: dict[int, list[str]] = {}
        for name, address in order:
            if not any(name in group for group in groups.values()):
                groups.setdefault(address, []).append(name)
        return list(groups.values())

    def _measure(
        self,
        block: nn.Module,
        layer: str,
        original: Keyed | None,
        weight: torch.Tensor | None,
        calls: list[Call],
        sums: Sums,
    ) -> Statistics:
        found: list[torch.Tensor] = []

        def stop(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            found.append(inputs[0].reshape(-1, inputs[0].shape[-1]))
            raise _Stop

        handle = block.get_submodule(layer).register_forward_pre_hook(stop)
        try:
            for i, (call, x) in enumerate(zip(calls, self._quantized, strict=True)):
                with contextlib.suppress(_Stop):
                    _run(block, call, x)
                if found:  # an expert may be idle
                    before = None if original is None else original.get(i)
                    sums.add(found.pop(), before, None if weight is None else weight[i].reshape(-1, 1))
        finally:
            handle.remove()
        return sums.statistics()

    @torch.no_grad()
    def _measure_experts(self, block: nn.Module, stack: str, calls: list[Call]) -> Iterator[Statistics]:
        """One for each expert when it is asked for, a few experts at a time where their Hessians take much memory.

        The block must not change in between.
        """
        shape = block.get_parameter(stack).shape
        at_once = max(1, self._hessian_bytes // (4 * max(shape[1:]) ** 2))
        for first in range(0, shape[0], at_once):
            sums = {e: Sums(shape[1:], Wanted(cross=False)) for e in range(first, min(first + at_once, shape[0]))}

            def heard(_name: str, expert: int, x: torch.Tensor, sums: dict[int, Sums] = sums) -> None:
                if expert in sums:
                    sums[expert].add(x, None, None)

            with Listener(block, [stack], heard):
                for call, x in zip(calls, self._quantized, strict=True):
                    _run(block, call, x)
            for expert in list(sums):
                yield sums.pop(expert).statistics()


def _run_of(block: nn.Module, calls: list[Call], window: int, x: torch.Tensor) -> torch.Tensor:
    return _run(block, calls[window], x)


def _keeper(store: Keyed, outputs: Stream) -> Callable[..., None]:
    """Keeps the input under the number of the sample, which is how many are through."""

    def keep(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        store[len(outputs)] = inputs[0].reshape(-1, inputs[0].shape[-1])

    return keep


def _noter(note: Callable[[str, torch.Tensor], None], name: str) -> Callable[..., None]:
    return lambda _module, inputs: note(name, inputs[0])


def _member(block: nn.Module, name: str) -> nn.Module | nn.Parameter:
    """A layer, or the parameter of a stack."""
    owner, _, last = name.rpartition(".")
    found: nn.Module | nn.Parameter = getattr(block.get_submodule(owner), last)
    return found


def _run(block: nn.Module, call: Call, x: torch.Tensor) -> torch.Tensor:
    args, kwargs = call
    out = block(x, *args[1:], **kwargs)
    first: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return first


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The longest list of modules of one class: the decoder (or encoder) blocks."""
    best: tuple[str, nn.ModuleList] | None = None
    for path, module in model.named_modules():
        alike = isinstance(module, nn.ModuleList) and len({type(m) for m in module}) == 1
        if alike and (best is None or len(module) > len(best[1])):
            best = path, module
    if best is None:
        raise ModelError("has no list of blocks to calibrate one by one", where=type(model).__name__)
    return best
