"""A course of learning: steps, a look at the windows held out now and then, the best kept.

Several processes share the windows of a step, and those of a look: gradients and losses are summed over all of them, so
that every process takes the same step; the first one keeps what is finished.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file

from bitfold.checkpoints.safetensors import digest_of
from bitfold.checkpoints.shards import save_tensors, sync_file
from bitfold.errors import ModelError, UsageError
from bitfold.system import progress
from bitfold.system.team import Team, alone
from bitfold.training.masters import Group, Masters, share_of
from bitfold.workspace.shared import Work

_WARM = 5  # steps over which rates rise, and by which the pace is known
_LOOKING = 0.1  # of the time; a look at a window takes a third of what learning from it does
_PATIENCE = 5  # of them without a better one
_FILE = "step-{}.safetensors"


class Learner(Protocol):
    """What learns, from windows that are known by their numbers."""

    def groups(self) -> list[Group]:
        """What is trained."""
        ...

    def learn(self, window: int, share: float) -> float:
        """There and back; its mean loss, of whose gradients the parameters get `share` more."""
        ...

    def loss(self, window: int) -> float:
        """Its mean loss."""
        ...


@dataclass(frozen=True)
class Pace:
    """How a course goes.

    Args:
        steps: how many; None = as many as there is time for.
        batch: windows of a step.
        seed: of their order.
        task: its name, for the one who waits.
        measure: the name of the loss.
        looks: at the windows held out, in all, if that takes no more; with one, nothing is kept on the way.
    """

    steps: int | None
    batch: int
    seed: int
    task: str
    measure: str
    looks: int = 20


@dataclass(frozen=True)
class Learned:
    """What a course ends with.

    Args:
        values: float32 parameters, by name.
        before, after: mean loss of the windows held out, at first and with these.
        best, steps, planned: after how many steps they were found; done; planned.
    """

    values: dict[str, torch.Tensor]
    before: float
    after: float
    best: int
    steps: int
    planned: int


@dataclass
class _State:
    """How far it is."""

    step: int
    best: int
    loss: float
    values: dict[str, torch.Tensor]
    looks: int = 0  # since the best


class Course:
    """Of one learner.

    Args:
        learner: that learns.
        pace: how many steps of how many windows.
        windows: how many are held out, the first ones; how many there are.
        work: where finished steps are noted.
        team: the processes at it.

    Raises:
        UsageError: more processes than windows of a step.
    """

    def __init__(
        self, learner: Learner, pace: Pace, windows: tuple[int, int], work: Work, team: Team | None = None
    ) -> None:
        self._learner, self._pace, self._work, self._team = learner, pace, work, team or alone()
        self._held_out, self._windows = windows
        if self._team.size > pace.batch:
            what = f"{self._team.size} processes cannot share the {pace.batch} windows of a step"
            raise UsageError(what, where="--batch", hint="larger steps, or fewer processes")
        self._masters = Masters(learner.groups())
        self._initial = {name: w.clone() for name, w in self._masters.values.items()}

    def run(self, left: Callable[[], float | None], check: Callable[[], None]) -> Learned:
        """Every step that is not done yet.

        Args:
            left: seconds that are left; None = steps were asked for.
            check: called after each step.

        Raises:
            ModelError: the loss is NaN.
        """
        plan = next(iter(self._work.journal.of_kind("course")), None)
        begun = time.monotonic()
        if plan is None:
            before = self._look()
            look = time.monotonic() - begun
            for step in range(min(_WARM, self._pace.steps or _WARM)):
                self._step(step, _WARM + 1)
            plan = self._plan(before, left(), time.monotonic() - begun - look, look)
            state = _State(min(_WARM, plan["steps"]), 0, before, self._initial)
            if self._pace.looks > 1:
                self._keep(state)
        else:
            state = self._recalled(plan)
        return self._rest(plan, state, check)

    def _plan(self, before: float, left: float | None, warm: float, look: float) -> dict[str, Any]:
        """Noted once: a process that goes on keeps to it, however fast it is."""
        steps = self._pace.steps
        if steps is None:
            pace = warm / _WARM
            steps = _WARM + max(1, int(((left or 0.0) - self._pace.looks * look) / max(pace, 1e-9)))
        plan: dict[str, Any] = self._team.told({"kind": "course", "steps": steps, "before": before})
        self._work.journal.append(plan)
        windows = f"{self._pace.batch} window{'s' * (self._pace.batch != 1)}"
        what = f"held-out {self._pace.measure} {before:.4f}"
        progress.say(f"{steps} step{'s' * (steps != 1)} of {windows} each; {what}")
        return plan

    def _rest(self, plan: dict[str, Any], state: _State, check: Callable[[], None]) -> Learned:
        steps = int(plan["steps"])
        every = max(steps // self._pace.looks, math.ceil(self._held_out / (3 * _LOOKING * self._pace.batch)))
        if state.step == steps and not state.looks:  # no more than those by which the pace is known
            self._judge(state)
        with progress.bar(self._pace.task, steps) as bar:
            bar.skip(state.step)
            while state.step < steps and state.looks < _PATIENCE:
                self._step(state.step, steps)
                state.step += 1
                if state.step % every == 0 or state.step == steps:
                    self._judge(state)
                check()
                bar.advance(1, f"held-out {self._pace.measure} {state.loss:.4f}")
        return Learned(state.values, float(plan["before"]), state.loss, state.best, state.step, steps)

    def _step(self, step: int, steps: int) -> None:
        """The windows of one step, one after the other; their order is drawn anew each time all were read."""
        count, first = self._windows - self._held_out, step * self._pace.batch
        for i in range(first + self._team.rank, first + self._pace.batch, self._team.size):
            generator = torch.Generator().manual_seed(self._pace.seed + i // count)
            number = self._held_out + int(torch.randperm(count, generator=generator)[i % count])
            if not self._learner.learn(number, 1 / self._pace.batch) < float("inf"):
                raise ModelError(f"NaN or infinity in step {step + 1}", hint="smaller steps: --rate")
        self._team.sum(self._masters.gradients())
        self._masters.step(share_of(step, steps, _WARM))

    def _look(self) -> float:
        """Mean loss of the windows held out."""
        mine = range(self._team.rank, self._held_out, self._team.size)
        total = torch.tensor([sum(self._learner.loss(number) for number in mine)], dtype=torch.float64)
        self._team.sum([total])
        return float(total) / self._held_out

    def _judge(self, state: _State) -> None:
        loss = self._look()
        state.looks += 1
        if loss < state.loss:
            state.loss, state.best, state.looks = loss, state.step, 0
            state.values = {name: w.clone() for name, w in self._masters.values.items()}
        if self._pace.looks > 1:
            self._keep(state)

    def _keep(self, state: _State) -> None:
        """On the disk, for a process that goes on; the one before is not needed any more."""
        if self._team.rank > 0:
            return
        file = self._work.state / _FILE.format(state.step)
        best = {f"best/{name}": w for name, w in state.values.items()}
        save_tensors({**self._masters.state(), **best}, file)
        sync_file(file)
        facts = {"step": state.step, "best": state.best, "loss": state.loss, "looks": state.looks}
        self._work.journal.append({"kind": "step", "file": file.name, "sha256": digest_of(file), **facts})
        self._work.journal.sync()
        for old in self._work.state.glob(_FILE.format("*")):
            if old != file:
                old.unlink()

    def _recalled(self, plan: dict[str, Any]) -> _State:
        """The last state whose file is as it was written; the beginning where there is none."""
        for record in reversed(self._work.journal.of_kind("step")):
            file = self._work.state / record["file"]
            if all(self._team.collected(file.is_file() and digest_of(file) == record["sha256"])):
                return self._restored(file, record)
        state = _State(0, 0, float(plan["before"]), self._initial)
        for step in range(min(_WARM, plan["steps"])):
            self._step(step, _WARM + 1)
            state.step += 1
        return state

    def _restored(self, file: Path, record: dict[str, Any]) -> _State:
        stored = load_file(file)
        self._masters.restore(stored, int(record["step"]))
        best = {name.removeprefix("best/"): w for name, w in stored.items() if name.startswith("best/")}
        progress.say(f"going on after step {record['step']}")
        return _State(int(record["step"]), int(record["best"]), float(record["loss"]), best, int(record["looks"]))
