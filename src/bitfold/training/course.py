"""The course of a distillation: steps, a look at the windows held out now and then, the best kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bitfold.checkpoints.safetensors import digest_of
from bitfold.checkpoints.shards import sync_file
from bitfold.errors import ModelError
from bitfold.system import progress
from bitfold.training.masters import Masters, share_of
from bitfold.training.options import Distillation
from bitfold.training.student import Student
from bitfold.training.teacher import Lessons
from bitfold.workspace.folder import Workspace

_WARM = 5  # steps over which rates rise, and by which the pace is known
_LOOKS = 20  # at the windows held out, in all, if that takes no more
_LOOKING = 0.1  # of the time; a look at a window takes a third of what learning from it does
_PATIENCE = 5  # of them without a better one
_FILE = "step-{}.safetensors"


@dataclass(frozen=True)
class Learned:
    """What a course ends with.

    Args:
        factors: float32 (n, 1), of the rows of quantized weights, by tensor.
        plain: float32 norms and biases, by name.
        before, kl: mean divergence of the windows held out, at first and with these numbers.
        best, steps, planned: after how many steps they were found; done; planned.
    """

    factors: dict[str, torch.Tensor]
    plain: dict[str, torch.Tensor]
    before: float
    kl: float
    best: int
    steps: int
    planned: int


@dataclass
class _State:
    """How far it is."""

    step: int
    best: int
    kl: float
    values: dict[str, torch.Tensor]
    looks: int = 0  # since the best


class Course:
    """Of one student.

    Args:
        student: that learns.
        lessons: its teacher's predictions.
        how: rates, windows of a step, order.
        windows: how many are held out, the first ones; how many there are.
        work: where finished steps are noted.
    """

    def __init__(
        self, student: Student, lessons: Lessons, how: Distillation, windows: tuple[int, int], work: Workspace
    ) -> None:
        self._student, self._lessons, self._how, self._work = student, lessons, how, work
        self._held_out, self._windows = windows
        self._masters = Masters(student.groups(how.rate, how.plain_rate))
        self._initial = {name: w.clone() for name, w in self._masters.values.items()}

    def run(self, left: Callable[[], float | None], check: Callable[[], None]) -> Learned:
        """Every step that is not done yet.

        Args:
            left: seconds that are left; None = steps were asked for.
            check: called after each step.

        Raises:
            ModelError: the divergence is NaN.
        """
        plan = next(iter(self._work.journal.of_kind("course")), None)
        begun = time.monotonic()
        if plan is None:
            before = self._look()
            look = time.monotonic() - begun
            for step in range(min(_WARM, self._how.steps or _WARM)):
                self._step(step, _WARM + 1)
            plan = self._plan(before, left(), time.monotonic() - begun - look, look)
            state = _State(min(_WARM, plan["steps"]), 0, before, self._initial)
            self._keep(state)
        else:
            state = self._recalled(plan)
        return self._rest(plan, state, check)

    def _plan(self, before: float, left: float | None, warm: float, look: float) -> dict[str, Any]:
        """Noted once: a process that goes on keeps to it, however fast it is."""
        steps = self._how.steps
        if steps is None:
            pace = warm / _WARM
            steps = _WARM + max(1, int(((left or 0.0) - _LOOKS * look) / max(pace, 1e-9)))
        plan = {"kind": "course", "steps": steps, "before": before}
        self._work.journal.append(plan)
        progress.say(f"{steps} steps of {self._how.batch} windows; held-out KL {before:.4f}")
        return plan

    def _rest(self, plan: dict[str, Any], state: _State, check: Callable[[], None]) -> Learned:
        steps = int(plan["steps"])
        every = max(steps // _LOOKS, math.ceil(self._held_out / (3 * _LOOKING * self._how.batch)))
        with progress.bar("distill", steps) as bar:
            bar.skip(state.step)
            while state.step < steps and state.looks < _PATIENCE:
                self._step(state.step, steps)
                state.step += 1
                if state.step % every == 0 or state.step == steps:
                    self._judge(state)
                check()
                bar.advance(1, f"held-out KL {state.kl:.4f}")
        rows = self._student.layers
        factors = {name: w for name, w in state.values.items() if name in rows}
        plain = {name: w for name, w in state.values.items() if name not in rows}
        return Learned(factors, plain, float(plan["before"]), state.kl, state.best, state.step, steps)

    def _step(self, step: int, steps: int) -> None:
        """The windows of one step, one after the other; their order is drawn anew each time all were read."""
        count = self._windows - self._held_out
        for i in range(step * self._how.batch, (step + 1) * self._how.batch):
            generator = torch.Generator().manual_seed(self._how.seed + i // count)
            number = self._held_out + int(torch.randperm(count, generator=generator)[i % count])
            kl = self._student.learn(self._lessons.ids[number], self._lessons.window(number), 1 / self._how.batch)
            if not kl < float("inf"):
                raise ModelError(f"NaN or infinity in step {step + 1}", hint="smaller steps: --rate")
        self._masters.step(share_of(step, steps, _WARM))

    def _look(self) -> float:
        """Mean divergence of the windows held out."""
        found = [self._student.divergence(self._lessons.ids[n], self._lessons.window(n)) for n in range(self._held_out)]
        return sum(found) / len(found)

    def _judge(self, state: _State) -> None:
        kl = self._look()
        state.looks += 1
        if kl < state.kl:
            state.kl, state.best, state.looks = kl, state.step, 0
            state.values = {name: w.clone() for name, w in self._masters.values.items()}
        self._keep(state)

    def _keep(self, state: _State) -> None:
        """On the disk, for a process that goes on; the one before is not needed any more."""
        file = self._work.state / _FILE.format(state.step)
        best = {f"best/{name}": w for name, w in state.values.items()}
        save_file({**self._masters.state(), **best}, file)
        sync_file(file)
        facts = {"step": state.step, "best": state.best, "kl": state.kl, "looks": state.looks}
        self._work.journal.append({"kind": "step", "file": file.name, "sha256": digest_of(file), **facts})
        self._work.journal.sync()
        for old in self._work.state.glob(_FILE.format("*")):
            if old != file:
                old.unlink()

    def _recalled(self, plan: dict[str, Any]) -> _State:
        """The last state whose file is as it was written; the beginning where there is none."""
        for record in reversed(self._work.journal.of_kind("step")):
            file = self._work.state / record["file"]
            if file.is_file() and digest_of(file) == record["sha256"]:
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
        return _State(int(record["step"]), int(record["best"]), float(record["kl"]), best, int(record["looks"]))
