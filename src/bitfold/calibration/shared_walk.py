"""A walk over blocks whose windows of text other processes run: who calls solves, the others listen.

The windows are shared out in groups of WINDOWS. A worker runs its group through the block as far as the layers that are
next, and answers with the products of their inputs; they are added here in the order of the groups, so the bits do not
depend on who ran which. Then the layers are solved here, rows of large ones by the others as well (`shared_rows`), and
their new weights go into a file that workers read before they run on. What a worker keeps between two tasks (the block,
answers of parts that are finished, inputs in the original model) only saves time: another one finds out the same.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bitfold.calibration.coding import Coded, Coder, Coding, code
from bitfold.calibration.listening import Errand, Facts, Heard, Weighing, listen, weigh, weighed
from bitfold.calibration.resume import Bookmarks
from bitfold.calibration.runner import Runner
from bitfold.calibration.shared_rows import code_together, shared_out
from bitfold.calibration.spill import Keyed, Stream
from bitfold.calibration.statistics import WINDOWS, Statistics, Sums, Wanted
from bitfold.calibration.walk import At, BlockWalk, Earlier, Run, Tuner, member
from bitfold.checkpoints.shards import save_tensors
from bitfold.executors.protocol import Executor, Needs, Task, run_all
from bitfold.system.backend import fast_dtype


@dataclass(frozen=True)
class Team:
    """Other processes that run windows.

    Args:
        executor: where they are.
        opening: what opens the run in them: an importable function, as for `Task`; see `listening.Opened`.
        needs: memory of each, bytes.
        limit: ceiling on the memory of each; None = none.
    """

    executor: Executor
    opening: Callable[[], Any]
    needs: int
    limit: int | None


def weigh_together(team: Team, layers: tuple[str, ...], seed: int, bookmarks: Bookmarks, windows: int) -> None:
    """Have the windows weighed by gradients, and keep what was found: nobody has to do it again.

    Args:
        team: who does it, each with the whole original model in memory.
        layers: whose tokens are weighed.
        seed: of the labels.
        bookmarks: of the run; the text is with them.
        windows: of the text.
    """
    left = [
        first for first in range(0, windows, WINDOWS) if bookmarks.window(min(first + WINDOWS, windows) - 1) is None
    ]
    needs = Needs(team.executor.threads, team.needs)
    where = (str(bookmarks.text_file), team.limit)
    tasks = [
        Task(
            f"weighing the tokens of windows from {first}",
            weigh,
            (Weighing(team.opening, where, layers, first, seed, fast_dtype()),),
            needs,
        )
        for first in left
    ]
    for _, file in run_all(team.executor, tasks):
        for number, (squares, state) in weighed(Path(file)).items():
            bookmarks.keep_window(number, squares, state)


class SharedWalk(BlockWalk):
    """See `BlockWalk`; `sharing` comes before everything else."""

    def sharing(self, team: Team, folder: Path, inputs: Path, about: tuple[int | None, bool, int]) -> SharedWalk:
        """Itself, with others who help.

        Args:
            team: they.
            folder: of the walk, which they see: activations lie in it.
            inputs: file of the token ids and weights.
            about: columns whose Hessian is kept whole, whether the original model is compared, seed of the run.
        """
        self._team, self._folder, self._inputs, self._about = team, folder, inputs, about
        self._saved, self._alone = 0, False
        self._clean()
        return self

    def _clean(self) -> None:
        """Let go of what was for one block."""
        for pattern in ("aside-*", "*.part", "solved-*"):
            for path in self._folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def block(
        self,
        index: int,
        layers: list[str],
        stacks: Mapping[str, Sequence[int]] | None = None,
        tuner: Tuner | None = None,
        wanted: Callable[[str], Wanted] = lambda _layer: Wanted(),
    ) -> Iterator[tuple[list[str], Iterable[Statistics]]]:
        """See `BlockWalk`; layers that are tuned together want all outputs here."""
        self._alone = tuner is not None
        yield from super().block(index, layers, stacks, tuner, wanted)

    def _run_original(self, at: At, run: Run) -> tuple[list[Keyed], Stream]:
        """The others do that on their way; their outputs come with those of the finished block."""
        if self._alone:
            return super()._run_original(at, run)
        return [], self._spill.stream(f"original-{at.index + 1}")

    def _hear(self, at: At, sums: Sums, runner: Runner, original: Earlier | None) -> None:
        """See `BlockWalk`."""
        if self._alone:
            super()._hear(at, sums, runner, original)
            return
        for heard in self._sent(at, "measuring"):
            assert heard.part is not None
            sums.take(load_file(heard.part))
            Path(heard.part).unlink()

    def _outputs(self, at: At, run: Run, into: Stream, originals: Stream) -> None:
        """See `BlockWalk`."""
        if self._alone:
            super()._outputs(at, run, into, originals)
            return
        for heard in self._sent(at, "running"):
            for name, stream in (("quantized", into), ("original", originals)):
                if name in heard.outputs:
                    for x in heard.outputs[name].stream():
                        stream.append(x)
                    Path(heard.outputs[name].path).unlink()
        self._clean()
        self._saved = 0

    def code(self, coding: Coding, whole: torch.Tensor) -> Coded:
        """See `coding.code`; rows of large layers are shared out."""
        if self._alone or not shared_out(coding, whole):
            return code(coding, whole)
        team = self._team
        needs = Needs(team.executor.threads, team.needs)
        return code_together(coding, whole, (team.executor, team.opening, needs, team.limit), self._folder)

    def _sent(self, at: At, doing: str) -> Iterator[Heard]:
        """The answers of all groups of windows, in their order."""
        self._save(at)
        executor, count = self._team.executor, len(self._quantized)
        needs = Needs(executor.threads, self._team.needs)
        tasks = [
            Task(f"{doing} {self.inside(at.index)}, windows from {first}", listen, (self._errand(at, first),), needs)
            for first in range(0, count, WINDOWS)
        ]
        order = {task.name: number for number, task in enumerate(tasks)}
        early, following = dict[int, Heard](), 0
        for task, heard in run_all(executor, tasks):
            early[order[task.name]] = heard
            while following in early:
                yield early.pop(following)
                following += 1

    def _errand(self, at: At, first: int) -> Errand:
        stop = min(first + WINDOWS, len(self._quantized))
        streams = {name: Facts.of(stream, first, stop) for name, stream in self.streams.items() if name in _RUN}
        groups = tuple((tuple(group), place) for group, place in zip(at.groups, at.places, strict=True))
        solved = tuple(str(self._solved(at, number)) for number in range(at.number))
        where = (str(self._folder), str(self._inputs), self.chain.path, self._team.limit)
        return Errand(self._team.opening, where, at.index, groups, solved, (first, stop), streams, self._about)

    def _solved(self, at: At, number: int) -> Path:
        return self._folder / f"solved-{at.index}-{number}.safetensors"

    def _save(self, at: At) -> None:
        """The weights that were solved since the last time, as the model has them now."""
        block = self.model.get_submodule(self.chain.blocks[at.index].path)
        for number in range(self._saved, at.number):
            found = {}
            for name in at.groups[number]:
                one = member(block, name)
                full = f"{name}.weight" if isinstance(one, torch.nn.Module) else name
                found[f"{self.inside(at.index)}{full}"] = block.get_parameter(full)
            save_tensors(found, self._solved(at, number))
        self._saved = at.number


def coder_of(walk: object) -> Coder:
    """What codes the rows of the layers of a walk."""
    return walk.code if isinstance(walk, SharedWalk) else code


_RUN = ("quantized", "original")
