"""Walk a list of blocks one by one, with the weights of one in memory.

The inputs of the first block are caught once. Each block then exists twice for a while: as it was (its inputs come from
the original model; left out where nothing is compared with it) and as it is being quantized (its inputs come from the
quantized blocks before). Inside a block the layers are taken in the order in which they run, those that share an input
together, so that every Hessian is that of the inputs the layer will really see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from bitfold.calibration.additions import OUTPUT, sums_behind
from bitfold.calibration.calls import Call, moved
from bitfold.calibration.catcher import Catcher, run_block
from bitfold.calibration.embedded import Tensors
from bitfold.calibration.finished import AnswerReplay
from bitfold.calibration.probe import ActivationCost, Probe, Rounding
from bitfold.calibration.runner import HESSIANS, Runner, passes
from bitfold.calibration.shape import BlockShape, ChainShape
from bitfold.calibration.spill import Keyed, Spill, Stream
from bitfold.calibration.statistics import Statistics, Sums, TuningBlock, Wanted
from bitfold.nn import set_tensor
from bitfold.system.backend import CPU

Run = Callable[[int, torch.Tensor], torch.Tensor]  # number of a sample, its input -> its output
_NOTHING = Wanted(cross=False)
Earlier = Callable[[int], torch.Tensor | None]  # number of a sample -> something of it in the original model
Tuner = Callable[[str, TuningBlock], None]


@dataclass(frozen=True)
class Text:
    """What a model is calibrated on.

    Args:
        ids: token ids (samples, seqlen).
        weights: of the tokens (samples, seqlen), by layer; empty = all alike.
    """

    ids: torch.Tensor
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def weight(self, layers: Iterable[str]) -> torch.Tensor | None:
        """Of the tokens for layers that share their input."""
        found = [self.weights[layer] for layer in layers if layer in self.weights]
        return torch.stack(found).mean(0) if found else None


@dataclass(frozen=True)
class At:
    """How far a block is: its number, its groups of layers (by names within it), how many of them are quantized, and
    where the outputs of the groups are added (see `sums_behind`)."""

    index: int
    groups: list[list[str]]
    number: int
    places: list[str | None]

    @property
    def group(self) -> list[str]:
        """The next one."""
        return self.groups[self.number]

    @property
    def place(self) -> str | None:
        """Of the next one."""
        return self.places[self.number]


class BlockWalk:
    """The blocks of one list, one after the other.

    Args:
        model: the skeleton on the meta device; it is filled and emptied block by block.
        source: the tensors of the model by name.
        chain: the list.
        text: what runs through them.
        spill: where activations wait for their turn; default: in memory.
        hessian_bytes: bytes of the Hessians of experts in memory at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Tensors,
        chain: ChainShape,
        text: Text,
        spill: Spill | None = None,
        hessian_bytes: int = HESSIANS,
    ) -> None:
        self.model, self.chain, self._source, self.text = model, chain, source, text
        self._spill, self._hessian_bytes = spill or Spill(), hessian_bytes
        self._catcher = Catcher(model, chain, text.ids)
        self._calls: list[list[Call]] = []  # for each block, for each sample
        self._original = self._quantized = Stream()
        self._compared, self._apart, self._unchanged = True, False, 0
        self._probe: Probe | None = None
        self._rounding: Callable[[str], Rounding] = lambda _layer: lambda x: x
        self.device = CPU

    def on(self, device: torch.device) -> BlockWalk:
        """Itself, its blocks run and solved on a device; what is before and behind them runs on the CPU."""
        self.device = device
        return self

    def __len__(self) -> int:
        return len(self.chain.blocks)

    @property
    def name(self) -> str:
        """By which it is known among the walks of a run."""
        return self.chain.path

    def inside(self, index: int) -> str:
        """What the names of the tensors of a block begin with."""
        return f"{self.chain.blocks[index].path}."

    def start(self) -> None:
        """Fill what comes before the blocks and catch what every block is called with."""
        self._original = self._quantized = self._spill.stream("original-0")
        self._calls = self._catcher.catch(self._source, self._original)

    @property
    def streams(self) -> dict[str, Stream]:
        """What enters the next block, in the original model, the quantized one and, if watched, with rounded inputs."""
        found = {"quantized": self._quantized}
        if self._compared and self._apart:
            found["original"] = self._original
        return found if self._probe is None else {**found, "rounded": self._probe.hidden}

    def enter(self, streams: Mapping[str, Stream]) -> None:
        """Go on with a later block, after `start` and `watch`: the activations that enter it are these."""
        self._quantized = streams["quantized"]
        self._original, self._apart = streams.get("original", self._quantized), "original" in streams
        if self._probe is not None:
            self._probe.hidden = streams["rounded"]

    def forget_original(self) -> None:
        """Nothing will be compared with the original model, after `start`: its blocks are not run."""
        self._compared = False

    def unchanged_before(self, index: int) -> None:
        """In blocks before this one nothing is quantized: they are run once, for both models. Before any is run."""
        self._unchanged = index

    def watch(self, rounding: Callable[[str], Rounding]) -> None:
        """Measure 8-bit activations on the way, after `start`: `rounding` says what a layer's input goes through."""
        self._probe, self._rounding = Probe(self._quantized, self._spill.stream("rounded-0")), rounding

    def acts(self, retie: Callable[[nn.Module], None]) -> ActivationCost:
        """What they cost, after the last block; `watch` must have been called.

        Args:
            retie: gives an output layer that shares the embedding its values; each name has its own parameter here.
        """
        assert self._probe is not None
        self.fill("", skip=f"{self.chain.path}.")
        retie(self.model)
        try:
            return self._probe.measure(self._original, self._quantized, self._catcher.tail)
        finally:
            self.empty("", skip=f"{self.chain.path}.")

    def ends(self, layer: str) -> Iterator[torch.Tensor]:
        """After the last block: what enters a layer behind the blocks in the quantized model, sample by sample."""
        return self._catcher.behind(self._source, self._quantized, layer)

    def run(self, index: int) -> Run:
        """What a block makes of the activations of a sample."""
        shape = self.chain.blocks[index]
        return partial(_run, self.model.get_submodule(shape.path), shape, self._calls[index], self.device)

    def fill(self, prefix: str, device: torch.device = CPU, *, skip: str | None = None) -> None:
        """Give the tensors below a prefix their values, float32, on a device."""
        module = self.model.get_submodule(prefix.rstrip("."))
        for kind in (module.named_parameters(), module.named_buffers()):
            for name, old in list(kind):
                full = prefix + name
                known = old.is_meta or full in self._source
                if (skip is None or not full.startswith(skip)) and (known or old.device != device):
                    value = self._source.read(full) if known else old
                    set_tensor(
                        self.model, full, (value.float() if known and value.is_floating_point() else value).to(device)
                    )

    def empty(self, prefix: str, *, skip: str | None = None) -> None:
        """Back to the meta device with the parameters below a prefix."""
        for name, value in list(self.model.named_parameters(remove_duplicate=False)):
            if name.startswith(prefix) and (skip is None or not name.startswith(skip)):
                set_tensor(self.model, name, value.to("meta"))

    @torch.no_grad()
    def block(
        self,
        index: int,
        layers: list[str],
        stacks: Mapping[str, Sequence[int]] | None = None,
        tuner: Tuner | None = None,
        wanted: Callable[[str], Wanted] = lambda _layer: Wanted(),
    ) -> Iterator[tuple[list[str], Iterable[Statistics]]]:
        """Load a block and yield its groups of layers with their statistics, in the order of their execution.

        The caller puts quantized weights into `model` before it asks for the next group. After the last group the
        outputs are passed on and the block is emptied.

        Args:
            index: of the block.
            layers: names of the linear layers of interest.
            stacks: stacks of experts of interest, by tensor, and their shape (experts, n, k); each is a group of its
                own, with one statistics for each expert instead of one for all.
            tuner: called with the block after the last group, to tune other layers of it together.
            wanted: what is to be known of the inputs of a layer, by its name.
        """
        name = self.chain.blocks[index].path
        self._apart = self._apart or index >= self._unchanged
        self.fill(f"{name}.", self.device)
        block, run = self.model.get_submodule(name), self.run(index)
        inside = [n.removeprefix(f"{name}.") for n in layers]
        stacked = {n.removeprefix(f"{name}."): experts for n, experts in (stacks or {}).items()}
        groups = self.runner(block, run, self._original).groups(inside, list(stacked))
        both = self._compared and self._apart
        at = At(index, groups, 0, self._places(index, run, groups, wanted) if both else [None] * len(groups))
        kept, outputs = self._run_original(at, run) if both else ([], self._quantized)
        finished = AnswerReplay(block, groups, len(self._quantized), self._spill)
        runner = self.runner(block, run, self._quantized)
        for number, group in enumerate(groups):
            finished.replay(number)
            full = [f"{name}.{layer}" for layer in group]
            if group[0] in stacked:
                yield full, runner.measure_experts(group[0], stacked[group[0]])
                continue
            sums = Sums(block.get_parameter(f"{group[0]}.weight").shape, wanted(full[0]))
            self._hear(replace(at, number=number), sums, runner, earlier(at.places[number], kept, number, outputs))
            yield full, [sums.statistics()]
            del sums
        if tuner is not None:
            finished.close()
            tuner(name, TuningBlock(block, run, self._quantized, outputs))
        finished.replay(len(groups))
        self._hand_on(replace(at, number=len(groups)), run, outputs, inside, finished)
        for store in kept:
            store.drop()

    def _places(
        self, index: int, run: Run, groups: list[list[str]], wanted: Callable[[str], Wanted]
    ) -> list[str | None]:
        """Where outputs of groups are added, if they are compared with the original model.

        Not of layers whose inputs are taken in ranges: a deficit is as large as the weight, and they are short of room.
        """
        block, path = self.model.get_submodule(self.chain.blocks[index].path), self.inside(index)
        about = [wanted(f"{path}{g[0]}") if isinstance(member(block, g[0]), nn.Module) else _NOTHING for g in groups]
        asked = [one.cross and one.columns is None for one in about]
        if not any(asked):
            return [None] * len(groups)
        found = sums_behind(block, lambda: run(0, self._original[0]), groups)
        return [place if one else None for place, one in zip(found, asked, strict=True)]

    def _hear(self, at: At, sums: Sums, runner: Runner, original: Earlier | None) -> None:
        """Sum over what enters a group of layers."""
        weight = self.text.weight(f"{self.inside(at.index)}{n}" for n in at.group)
        runner.measure(at.group[0], sums, original, weight, place=at.place)

    def runner(self, block: nn.Module, run: Run, inputs: Stream) -> Runner:
        """Runs of a block over all windows."""
        return Runner(block, passes(lambda i: run(i, inputs[i]), len(inputs)), self._hessian_bytes)

    def _hand_on(
        self,
        at: At,
        run: Run,
        outputs: Stream,
        layers: list[str],
        finished: AnswerReplay,
    ) -> None:
        """Outputs of the finished block become inputs of the next one; `outputs`: those of the block as it was."""
        index, name = at.index, self.chain.blocks[at.index].path
        block, quantized = self.model.get_submodule(name), self._spill.stream(f"quantized-{index + 1}")
        self._outputs(at, run, quantized, outputs)
        finished.close()
        if self._probe is not None:
            rounding = {layer: self._rounding(f"{name}.{layer}") for layer in layers}
            self._probe.advance(block, rounding, run, self._spill.stream(f"rounded-{index + 1}"))
        self._original, self._quantized = outputs if self._compared and self._apart else quantized, quantized
        self.empty(f"{name}.")

    def _outputs(self, at: At, run: Run, into: Stream, _originals: Stream) -> None:
        """What the finished block makes of every window."""
        for i, x in enumerate(self._quantized):
            into.append(run(i, x))

    def _run_original(self, at: At, run: Run) -> tuple[list[Keyed], Stream]:
        """What enters each group, and what comes out, of the block as it was."""
        outputs = self._spill.stream(f"original-{at.index + 1}")
        return self.run_original(at, run, outputs, self._spill), outputs

    def run_original(self, at: At, run: Run, outputs: Stream, spill: Spill) -> list[Keyed]:
        """Run the block as it was, nothing in it being quantized yet.

        Returns:
            For each group, by sample: what enters it; or what is where its outputs are added, if that is inside the
            block.

        Args:
            at: the block.
            run: (number of a sample, its input) -> its output.
            outputs: takes the outputs.
            spill: where the inputs wait.
        """
        block, handles = self.model.get_submodule(self.chain.blocks[at.index].path), []
        kept = [Keyed(spill.scratch()) for _ in at.groups]
        for store, group, place in zip(kept, at.groups, at.places, strict=True):
            found = member(block, group[0]) if place is None else block.get_submodule(place)
            if place != OUTPUT and isinstance(found, nn.Module):
                handles.append(found.register_forward_pre_hook(_keeper(store, outputs)))
        for i, x in enumerate(self._original):
            outputs.append(run(i, x))
        for handle in handles:
            handle.remove()
        return kept


def _run(
    block: nn.Module, shape: BlockShape, calls: list[Call], device: torch.device, sample: int, x: torch.Tensor
) -> torch.Tensor:
    return run_block(block, shape, moved(calls[sample], device), x.to(device))


def _keeper(store: Keyed, outputs: Stream) -> Callable[..., None]:
    """Keeps the input under the number of the sample, which is how many are through."""

    def keep(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        store[len(outputs)] = inputs[0].reshape(-1, inputs[0].shape[-1])

    return keep


def earlier(place: str | None, kept: list[Keyed], number: int, outputs: Stream) -> Earlier | None:
    """What a group is compared with: of what was kept of the block as it was, or its outputs."""
    if place == OUTPUT:
        return outputs.__getitem__
    return kept[number].get if kept else None


def member(block: nn.Module, name: str) -> nn.Module | nn.Parameter:
    """A layer, or the parameter of a stack."""
    owner, _, last = name.rpartition(".")
    found: nn.Module | nn.Parameter = getattr(block.get_submodule(owner), last)
    return found
