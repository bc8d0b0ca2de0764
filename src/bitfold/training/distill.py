"""Distillation: row scales, norms and biases of a quantized folder, trained on the divergence from its original.

Codes stay as they are, so the result is the same format and loads wherever the folder did. First the teacher reads the
text and leaves its predictions on disk; then it is gone, and the student reads the same windows. Everything is noted in
a journal: a run that was killed goes on with the same command, to the same bytes.

Row scales and norms after rounding: Malinovskii et al. 2024 (PV-tuning, arXiv 2405.14852) and the end-to-end step of
QuIP# (arXiv 2402.04396); here with the KL divergence to the original as loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bitfold.checkpoints.bitfold_folder import QuantizedSource
from bitfold.models.load import load_folder
from bitfold.models.model_ref import ModelRef
from bitfold.models.opening import open_skeleton
from bitfold.models.vocabulary import embedding_rows
from bitfold.records.run_report import peak_memory
from bitfold.system import memory, progress
from bitfold.system.backend import fast_dtype
from bitfold.system.team import Team, alone
from bitfold.text.windows import text_digest
from bitfold.training.course import Course, Learned, Pace
from bitfold.training.masters import Group
from bitfold.training.options import Distillation
from bitfold.training.result import write_result
from bitfold.training.student import Student, blocks_of, fitting
from bitfold.training.teacher import Lessons
from bitfold.training.texts import held_out_first
from bitfold.workspace.folder import Workspace, software
from bitfold.workspace.shared import Work, shared_output, shared_work

_TEACHER = 0.2  # of the time at most
_BATCHES = 4  # of windows to learn from that there are at least, however little time there is


@dataclass(frozen=True)
class Distilled:
    """What came of it.

    Args:
        source, output, teacher: names of folders.
        kl_before, kl_after: mean KL(teacher || student) over the windows held out, nats a token, over the words that
            were kept; `kl_after` is that of what was written.
        steps, planned, best: steps that were done, that were planned, and after how many the best was found.
        windows, held_out, tokens: windows learned from, windows held out, tokens of each.
        scales, plain: trained factors of rows, and numbers of norms and biases.
        dtype: computed in.
        seconds: wall-clock time of this process.
        peak_memory: bytes; None where the system does not tell.
    """

    source: str
    output: str
    teacher: str
    kl_before: float
    kl_after: float
    steps: int
    planned: int
    best: int
    windows: int
    held_out: int
    tokens: int
    scales: int
    plain: int
    dtype: str
    seconds: float
    peak_memory: int | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, keys as the attributes."""
        return asdict(self)


def distill(
    folder: str | Path,
    teacher: str | Path,
    out: str | Path,
    how: Distillation | None = None,
    *,
    max_memory: int | None = None,
    restart: bool = False,
    revision: str | None = None,
    token: str | None = None,
    team: Team | None = None,
    lessons: Path | None = None,
) -> Distilled:
    """Train the scales of a quantized folder on its original's predictions, and write the folder anew.

    Args:
        folder: that bitfold quantized, or a Hub repository with one; it is not changed.
        teacher: the original, or any model with the same vocabulary: a folder, a GGUF file, a Hub repository.
        out: the folder to make; must not exist, or be empty.
        how: see `Distillation`.
        max_memory: ceiling on the resident memory of the process, bytes: kept by running blocks twice and by decoding
            weights again and again, or refused; None = four fifths of what is free.
        restart: forget what an earlier run that was cut short has finished.
        revision, token: of the Hub repository.
        team: the processes that call this together, each on a share of the windows; they see the same folders.
        lessons: a folder in which this teacher's predictions are kept from one call to another; None = they go.

    Raises:
        BitfoldError: what is wrong, where, and what to do; finished work stays, and the same call goes on with it.
    """
    from bitfold.checkpoints.hub.fetch import resolve

    started, how = time.monotonic(), how or Distillation()
    local = resolve(str(folder), revision=revision, token=token)
    source, original = QuantizedSource(local), ModelRef.of(teacher)
    original.require_causal("a causal language model can be distilled")
    team = team or alone()
    place = shared_output(out, local, team)
    task = _Task(source, original, how, max_memory, team, lessons)
    with shared_work(place, task.identity(), task.team, restart=restart) as work:
        learned, facts = task.learn(work, started)
        found = Distilled(
            **{"source": local.name, "output": str(place), "teacher": Path(original.name).name, **facts},
            seconds=time.monotonic() - started,
            peak_memory=peak_memory(),
        )
        if isinstance(work, Workspace):
            write_result(source, work.result, learned, found.to_dict())
            work.publish()
    return found


@dataclass(frozen=True)
class _Pupil:
    """A student and what it hears: a `Learner`."""

    student: Student
    lessons: Lessons
    how: Distillation

    def groups(self) -> list[Group]:
        return self.student.groups(self.how.rate, self.how.plain_rate, self.how.weight_rate)

    def learn(self, window: int, share: float) -> float:
        return self.student.learn(self.lessons.ids[window], self.lessons.window(window), share)

    def loss(self, window: int) -> float:
        return self.student.divergence(self.lessons.ids[window], self.lessons.window(window))


@dataclass(frozen=True)
class _Task:
    """A student's source, its teacher, and how it is taught."""

    source: QuantizedSource
    teacher: ModelRef
    how: Distillation
    max_memory: int | None
    team: Team
    lessons: Path | None

    def identity(self) -> dict[str, Any]:
        """What decides the bytes of the result."""
        return {
            "source": {"name": self.source.path.name, "files": self.source.fingerprint()},
            "teacher": self.teacher.fingerprint(),
            "distillation": {**asdict(self.how), "text": text_digest(self.how.text)},
            "dtype": str(fast_dtype()),
            "processes": self.team.size,
            "version": software(),
        }

    def learn(self, work: Work, started: float) -> tuple[Learned, dict[str, Any]]:
        """The trained numbers, and facts about how they came about."""
        skeleton: Any = open_skeleton(self.source)
        how = self.how
        ids, held_out = held_out_first(
            self.source.path, how.text, skeleton, how.windows, how.seqlen, start_token=how.start_token
        )
        ids = torch.cat([ids[:held_out], ids[held_out:].roll(-how.first, 0)])
        lessons, dtype = Lessons(work, ids, how.likeliest, self.team, self.lessons), fast_dtype()
        ceiling = memory.Ceiling(self.max_memory)
        most = len(ids) if how.steps is None else min(len(ids), held_out + how.steps * how.batch)
        windows = lessons.write(self.teacher, dtype, self._enough(held_out, started), embedding_rows(skeleton), most)
        ceiling.check()
        model, blocks = load_folder(self.source.path, dtype=dtype), blocks_of(skeleton)
        limit = memory.default_ceiling() if self.max_memory is None else self.max_memory
        fit = fitting(model, blocks, ids.shape[1], limit, weights=how.weights)
        student = Student(model, blocks, fit, weights=how.weights)
        seconds = None if self.how.steps is not None else 60 * self.how.minutes
        pace = Pace(self.how.steps, self.how.batch, self.how.seed, "distill", "KL", self.how.looks)
        course = Course(_Pupil(student, lessons, self.how), pace, (held_out, windows), work, self.team)
        learned = course.run(lambda: None if seconds is None else seconds - (time.monotonic() - started), ceiling.check)
        scales = sum(w.numel() for name, w in learned.values.items() if name in student.layers)
        plain = sum(w.numel() for w in learned.values.values()) - scales
        facts: dict[str, Any] = {
            "kl_before": learned.before,
            "kl_after": learned.after,
            "steps": learned.steps,
            "best": learned.best,
        }
        facts |= {"planned": learned.planned, "windows": windows - held_out, "held_out": held_out}
        facts |= {"tokens": ids.shape[1], "scales": scales, "plain": plain, "dtype": str(dtype).removeprefix("torch.")}
        return learned, facts

    def _enough(self, held_out: int, started: float) -> Callable[[int], bool]:
        """Whether the teacher has read enough for the time that there is."""
        if self.how.steps is not None:
            return lambda _: False
        least = held_out + _BATCHES * self.how.batch
        patience = _TEACHER * 60 * self.how.minutes
        return lambda done: done >= least and time.monotonic() - started > patience


def say_what_came_of_it(found: Distilled) -> str:
    """In a line."""
    change = f"held-out KL {found.kl_before:.4f} -> {found.kl_after:.4f}"
    when = f"after {found.best} of {found.planned} steps, in {progress.duration(found.seconds)}"
    return f"{found.output}: {change} {when}"
