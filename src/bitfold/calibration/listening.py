"""What a worker does for a calibrated run: some windows through one block, as far as it is asked to."""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import nn

from bitfold.calibration.finished import AnswerReplay
from bitfold.calibration.fisher import Some, token_weights
from bitfold.calibration.resume import IDS
from bitfold.calibration.shape import walk_shape
from bitfold.calibration.spill import Keyed, Spill, Stream
from bitfold.calibration.statistics import WINDOWS, Sums, Wanted
from bitfold.calibration.tensors import Reader, original
from bitfold.calibration.walk import At, BlockWalk, Run, Text, earlier, member
from bitfold.checkpoints import Source
from bitfold.checkpoints.shards import save_tensors
from bitfold.errors import ModelError
from bitfold.models.swap import transform_of
from bitfold.nn import set_tensor
from bitfold.planning.plan import Plan
from bitfold.system.memory import Ceiling

_counter = itertools.count()


class Opened(Protocol):
    """A run that this process has opened: its source, the skeleton of its model, its plan."""

    @property
    def source(self) -> Source:
        """Open for reading."""

    @property
    def model(self) -> nn.Module | None:
        """On the meta device."""

    @property
    def plan(self) -> Plan:
        """What becomes of every tensor."""


@dataclass(frozen=True)
class Facts:
    """Activations in a file: where each window's begin, dtype and shape."""

    path: str
    tensors: tuple[tuple[int, torch.dtype, tuple[int, ...]], ...]

    @classmethod
    def of(cls, stream: Stream, first: int, stop: int) -> Facts:
        """Some windows of a stream that is a file."""
        assert stream.path is not None
        return cls(str(stream.path), tuple(stream.places()[first:stop]))

    def stream(self) -> Stream:
        """To be read."""
        return Stream.at(Path(self.path), self.tensors)


@dataclass(frozen=True)
class Errand:
    """What is asked for.

    Args:
        opening: opens the run.
        where: folder of the walk, file of the text, path of the list of blocks, ceiling of memory in bytes or None.
        index: of the block.
        groups: its groups of layers, each with the place where its output is added, see `additions.sums_behind`.
        solved: files of the new weights of the groups that are quantized, in their order.
        windows: first one, and the one after the last.
        streams: activations that enter the block, of the quantized model, and of the original one where it is compared.
        about: columns whose Hessian is kept whole, whether the original model is compared, seed of the run.
    """

    opening: Callable[[], Opened]
    where: tuple[str, str, str, int | None]
    index: int
    groups: tuple[tuple[tuple[str, ...], str | None], ...]
    solved: tuple[str, ...]
    windows: tuple[int, int]
    streams: Mapping[str, Facts]
    about: tuple[int | None, bool, int]

    def at(self) -> At:
        """How far the block is."""
        groups, places = [list(group) for group, _ in self.groups], [place for _, place in self.groups]
        return At(self.index, groups, len(self.solved), places)


@dataclass(frozen=True)
class Heard:
    """The answer: a file of sums, as `Sums.part` gives them; or, of a block that is finished, its outputs."""

    part: str | None = None
    outputs: Mapping[str, Facts] = field(default_factory=dict)


@dataclass
class _Seat:
    """What is kept of some windows while they are in a block."""

    walk: BlockWalk
    index: int = -1
    kept: list[Keyed] = field(default_factory=list)
    originals: Stream | None = None
    answers: AnswerReplay | None = None


class _Bench:
    """The windows of one walk that this process has had."""

    def __init__(self, errand: Errand) -> None:
        folder, inputs, path, limit = errand.where
        run = errand.opening()
        if run.model is None:
            raise ModelError("its class is not known here", where=platform.node())
        self.plan, self.model = run.plan, run.model
        self.reader = Reader(run.source, run.model, run.plan)
        self.chain = next(chain for chain in walk_shape(run.model).chains if chain.path == path)
        self.folder = Path(folder) / f"aside-{platform.node()}-{os.getpid()}"
        self.text = load_file(inputs)
        self.ceiling = Ceiling(limit)
        self.seats: dict[int, _Seat] = {}
        self._block, self._applied = "", 0

    def seat(self, errand: Errand) -> _Seat:
        """Of its windows, in its block, with nothing done but what is known already."""
        self.folder.mkdir(exist_ok=True)
        first, stop = errand.windows
        if first not in self.seats:
            weights = {name: w[first:stop] for name, w in self.text.items() if name != IDS}
            text = Text(self.text[IDS][first:stop], weights)
            walk = BlockWalk(self.model, self.reader, self.chain, text)
            walk.start()
            self.seats[first] = _Seat(walk)
        seat = self.seats[first]
        seat.walk.enter({name: facts.stream() for name, facts in errand.streams.items()})
        if seat.index != errand.index:
            block = self._enter(errand.index)
            seat.index, seat.kept, seat.originals = errand.index, [], None
            seat.answers = AnswerReplay(block, errand.at().groups, stop - first, Spill(self.folder))
        return seat

    def _enter(self, index: int) -> nn.Module:
        """The block, its weights in memory as far as they were."""
        name = self.chain.blocks[index].path
        if self._block != name:
            if self._block:
                self.any_walk.empty(f"{self._block}.")
            self._block = name
            self.refill()
        return self.model.get_submodule(name)

    @property
    def any_walk(self) -> BlockWalk:
        """Any: they share the model."""
        return next(iter(self.seats.values())).walk

    def refill(self) -> None:
        """The weights of the block as they were."""
        self.any_walk.fill(f"{self._block}.")
        self._applied = 0

    def apply(self, solved: tuple[str, ...]) -> None:
        """The new weights of its quantized groups."""
        if self._applied > len(solved):
            self.refill()
        for file in solved[self._applied :]:
            for name, value in load_file(file).items():
                set_tensor(self.model, name, value)
        self._applied = len(solved)

    def wanted(self, layer: str, about: tuple[int | None, bool, int]) -> Wanted:
        """What is to be known of the inputs of a layer."""
        columns, cross, seed = about
        decision = next(d for d in self.plan.quantized if d.site.module == layer)
        if columns is None or decision.site.qshape[-1] <= columns:
            return Wanted(cross)
        return Wanted(cross, columns, transform_of(decision.scheme, decision.site, seed))

    def aside(self, kind: str) -> Path:
        """A new file for an answer."""
        return self.folder.parent / f"{kind}-{platform.node()}-{os.getpid()}-{next(_counter)}.part"


@dataclass(frozen=True)
class Weighing:
    """Windows whose tokens are to be weighed by gradients.

    Args:
        opening: opens the run.
        where: file of the text, ceiling of memory in bytes or None.
        layers: whose tokens are weighed.
        first: window; it and those after it, as many as make a group.
        seed: of the labels.
        dtype: that the model is read in: one for all, whatever a worker multiplies fastest.
    """

    opening: Callable[[], Opened]
    where: tuple[str, int | None]
    layers: tuple[str, ...]
    first: int
    seed: int
    dtype: torch.dtype


_wholes: dict[str, nn.Module] = {}


def weigh(task: Weighing) -> str:
    """Weigh them; the name of a file for `weighed`."""
    text, limit = task.where
    run, ceiling = task.opening(), Ceiling(limit)
    assert run.model is not None
    if text not in _wholes:
        _wholes.clear()
        _wholes[text] = original(run.source, Reader(run.source, run.model, run.plan), task.dtype)
    ids = load_file(text)[IDS][: task.first + WINDOWS]
    some = Some(task.first, ids.shape[1], task.seed)
    blocks = [block.path for block in walk_shape(run.model).blocks]
    token_weights(_wholes[text], task.layers, ids, seed=task.seed, blocks=blocks, marks=some)
    found = {f"{number}/{name}": row for number, (squares, _) in some.found.items() for name, row in squares.items()}
    states = {f"{number}/": state for number, (_, state) in some.found.items()}
    path = Path(text).with_name(f"weighed-{platform.node()}-{os.getpid()}-{next(_counter)}.safetensors")
    save_tensors({**found, **states}, path)
    ceiling.check()
    return str(path)


def weighed(file: Path) -> dict[int, tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """What is in the file, by window: squares by layer, and the state of the generator of labels. The file goes."""
    found: dict[int, tuple[dict[str, torch.Tensor], torch.Tensor]] = {}
    tensors = load_file(file)
    for key, value in tensors.items():
        number, _, name = key.partition("/")
        if name:
            found.setdefault(int(number), ({}, tensors[f"{number}/"]))[0][name] = value
    file.unlink()
    return found


_benches: dict[tuple[Any, ...], _Bench] = {}


@torch.no_grad()
def listen(errand: Errand) -> Heard:
    """Run windows through a block: to the layers that are next, or to its end."""
    _wholes.clear()
    if errand.where not in _benches:
        _benches.clear()
        _benches[errand.where] = _Bench(errand)
    bench = _benches[errand.where]
    try:
        heard = _listen(bench, errand)
    except BaseException:
        _benches.clear()  # whatever state it was left in
        raise
    bench.ceiling.check()
    return heard


def _listen(bench: _Bench, errand: Errand) -> Heard:
    seat = bench.seat(errand)
    walk, run = seat.walk, seat.walk.run(errand.index)
    at = errand.at()
    compared = "original" in errand.streams
    if compared and seat.originals is None:
        bench.apply(())
        outputs = Stream(bench.aside("original"))
        seat.kept = walk.run_original(at, run, outputs, Spill(bench.folder))
        seat.originals = outputs
    bench.apply(errand.solved)
    assert seat.answers is not None
    seat.answers.replay(at.number)
    try:
        if at.number < len(at.groups):
            return Heard(part=_measured(bench, seat, errand, run, at))
        return _handed_on(bench, seat, run)
    finally:
        if seat.answers is not None:  # it is done with once its block is
            seat.answers.forget()


def _measured(bench: _Bench, seat: _Seat, errand: Errand, run: Run, at: At) -> str:
    prefix, walk = seat.walk.inside(errand.index), seat.walk
    full = [f"{prefix}{layer}" for layer in at.group]
    block = bench.model.get_submodule(prefix.rstrip("."))
    layer = member(block, at.group[0])
    assert isinstance(layer, nn.Module)
    sums = Sums(layer.get_parameter("weight").shape, bench.wanted(full[0], errand.about))
    original = None if seat.originals is None else earlier(at.place, seat.kept, at.number, seat.originals)
    runner = walk.runner(block, run, walk.streams["quantized"])
    runner.measure(at.group[0], sums, original, walk.text.weight(full), closing=False, place=at.place)
    path = bench.aside("heard")
    save_tensors(sums.part(), path)
    return str(path)


def _handed_on(bench: _Bench, seat: _Seat, run: Run) -> Heard:
    """The outputs of a finished block; what was kept of it is let go."""
    stream = Stream(bench.aside("quantized"))
    for i, x in enumerate(seat.walk.streams["quantized"]):
        stream.append(run(i, x))
    found = {"quantized": stream, **({} if seat.originals is None else {"original": seat.originals})}
    answers, kept = seat.answers, seat.kept
    if answers is not None:
        answers.close()
    for store in kept:
        store.drop()
    seat.index, seat.kept, seat.originals, seat.answers = -1, [], None, None
    return Heard(outputs={name: Facts.of(one, 0, len(one)) for name, one in found.items()})
