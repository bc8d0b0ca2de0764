"""Tensors that need no data, made by other processes: the plan cut into tasks, their parts taken in as they come."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bitfold.calibration.shared_walk import Team
from bitfold.checkpoints import Source
from bitfold.errors import CheckpointError, ResourceError
from bitfold.executors.protocol import Executor, Needs, Task, run_all
from bitfold.forecast.memory import LIBRARIES, data_free
from bitfold.planning.decisions import Quantized
from bitfold.planning.plan import Item, Plan
from bitfold.run.items import Made, left_of
from bitfold.run.order import Order, Planned, planned
from bitfold.run.parts import make_part, parts_in, read_part
from bitfold.system import memory, progress
from bitfold.system.units import size_text

_LARGEST = 256 << 20  # bytes of the source that a task takes, unless a tensor alone is larger
_EACH = 6  # tasks for each worker, so that none waits long for the last one
_QUANTIZED = 10  # times the work of keeping a number


@dataclass(frozen=True)
class Share:
    """Memory of each worker, bytes.

    Args:
        base: of a process before it begins, libraries included.
        limit: what it may take; None = no ceiling was named.
        running: what it takes when it runs text through a block; 0 = none does.
    """

    base: int
    limit: int | None
    running: int = 0


def share_memory(run: Planned, executor: Executor, max_memory: int | None, running: int = 0) -> Share:
    """What each worker needs, and gets of a ceiling over all of them and this process.

    Args:
        run: what is to be done.
        executor: who does it.
        max_memory: the ceiling, bytes; None = none.
        running: bytes of a process that runs text through blocks and solves them; 0 = nothing is calibrated.

    Raises:
        ResourceError: there are too many workers for the ceiling.
    """
    base = (memory.resident() or 0) + LIBRARIES
    needs = max(running, base + max((_stage(run.source, item) for item in run.plan.items), default=0))
    if max_memory is None:
        return Share(base, None, running)
    rest = max_memory - max(base, running)
    limit = rest // executor.workers
    if limit < needs:
        fit = max(0, rest // needs)
        what = f"{size_text(max_memory)} leave {size_text(max(0, limit))} to each of {executor.workers} workers"
        hint = f"{fit} workers fit" if fit else f"one needs about {size_text(max(base, running) + needs)}"
        raise ResourceError(f"{what}, {size_text(needs)} are needed", where="--max-memory", hint=hint)
    return Share(base, limit, running)


def _stage(source: Source, item: Item) -> int:
    return max((data_free(source, item, d).nbytes for d in item.decisions.values()), default=0)


class Crew:
    """Makes what needs no data of one run.

    Args:
        executor: who does the work.
        order: what the run is.
        source, plan: as they are here.
        share: memory of each worker.
        folder: where parts lie; made if it is not there.

    Raises:
        ResourceError: a machine does not see the source or that folder.
    """

    def __init__(
        self, executor: Executor, order: Order, source: Source, plan: Plan, share: Share, folder: Path
    ) -> None:
        self._executor, self._order, self._source, self._plan = executor, order, source, plan
        self._share, self._folder = share, folder
        self._folder.mkdir(exist_ok=True)
        if blind := executor.blind([order.source, str(folder)]):
            what = f"{', '.join(blind)} does not see {order.source} and {folder}"
            hint = "source and output on storage that all machines share, under the same path"
            raise ResourceError(what, where="--executor", hint=hint)

    def team(self) -> Team:
        """For the calibrated part of the run."""
        return Team(self._executor, partial(planned, self._order), self._share.running, self._share.limit)

    def made(self, items: Sequence[Item], times: Mapping[str, float], done: Mapping[str, object]) -> Iterator[Made]:
        """The tensors of these items but for those that are done, in the order in which they come.

        Args:
            items: of the plan.
            times: seconds that each tensor takes, by the forecast; empty = nobody knows.
            done: names of tensors that are written; it grows while this runs.
        """
        for name in parts_in(self._folder, self._order.identity):
            yield from self._left_behind(name, done)
        left = [item for item in items if left_of(item, done)]
        tasks = [self._task(some, done) for some in self._cut(left, times)]
        if tasks:
            each = "" if self._share.limit is None else f", {size_text(self._share.limit)} of memory each"
            workers = f"{self._executor.workers} workers of {self._executor.threads} threads{each}"
            progress.say(f"{len(tasks)} tasks for {workers}")
        for _, name in run_all(self._executor, tasks):
            yield from self._taken(name, done)

    def _left_behind(self, name: str, done: Mapping[str, object]) -> Iterator[Made]:
        """A part that an earlier run had no time to take in."""
        try:
            yield from self._taken(name, done)
        except CheckpointError as error:
            if error.where != str(self._folder / name):
                raise
            progress.say(f"{error.what}, and is made again: {error.where}")
            shutil.rmtree(self._folder / name)

    def _taken(self, name: str, done: Mapping[str, object]) -> Iterator[Made]:
        for made in read_part(self._folder / name, self._plan):
            if made.decision.tensor not in done:
                yield made
        shutil.rmtree(self._folder / name)

    def _task(self, items: Sequence[Item], done: Mapping[str, object]) -> Task:
        names = tuple(name for item in items for name in left_of(item, done))
        between = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        largest = max(_stage(self._source, item) for item in items)
        needs = Needs(self._executor.threads, self._share.base + largest)
        arguments = (self._order, names, str(self._folder), self._share.limit)
        return Task(f"quantizing {between}", make_part, arguments, needs)

    def _cut(self, items: Sequence[Item], times: Mapping[str, float]) -> Iterator[list[Item]]:
        """Neighbours together: small ones until they are worth a task."""
        works = [_work(item, times) for item in items]
        enough = sum(works) / (_EACH * max(1, self._executor.workers))
        some, work, size = list[Item](), 0.0, 0
        for item, more in zip(items, works, strict=True):
            nbytes = sum(d.info.nbytes for d in item.decisions.values())
            if some and (work + more > enough or size + nbytes > _LARGEST):
                yield some
                some, work, size = [], 0.0, 0
            some.append(item)
            work, size = work + more, size + nbytes
        if some:
            yield some


def _work(item: Item, times: Mapping[str, float]) -> float:
    if times:
        return sum(times.get(name, 0.0) for name in item.decisions)
    return sum(d.info.numel * (_QUANTIZED if isinstance(d, Quantized) else 1) for d in item.decisions.values())
