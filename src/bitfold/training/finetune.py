"""Finetuning: LoRA adapters beside the packed weights of a folder, trained on a text; the base stays as it is.

What is read, held out and noted is as in `distill`: windows side by side, the best of what the windows held out say is
kept, and a run that was killed goes on with the same command, to the same bytes.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitfold.calibration.tail import recomputed
from bitfold.checkpoints.bitfold_folder import QuantizedSource
from bitfold.checkpoints.manifest import weights_digest
from bitfold.models.load import load_folder
from bitfold.models.model_ref import ModelRef
from bitfold.models.opening import open_skeleton
from bitfold.records.record import carry_record
from bitfold.records.run_report import peak_memory
from bitfold.system import memory, progress
from bitfold.system.backend import fast_dtype
from bitfold.system.team import Team, alone
from bitfold.text.mixes import without_folders
from bitfold.text.windows import text_digest
from bitfold.training.adapters import add_adapters, require_peft, save_adapter, start_from, trained
from bitfold.training.course import Course, Learned, Pace
from bitfold.training.layers import frozen_layers, install
from bitfold.training.losses import surprise_and_gradient
from bitfold.training.masters import Group
from bitfold.training.options import Finetuning
from bitfold.training.reading import Loss, Reading
from bitfold.training.student import blocks_of, fitting
from bitfold.training.texts import held_out_first, weighed
from bitfold.workspace.folder import Workspace, software
from bitfold.workspace.shared import Work, shared_output, shared_work

Windows = tuple[torch.Tensor, torch.Tensor | None]
_STATE = 5 * 4  # bytes a trained number takes: itself, its master, two moments, a gradient
PART = "finetune"  # of the record of the adapter's folder


@dataclass(frozen=True)
class Finetuned:
    """What came of it.

    Args:
        base, output, original: names of folders; the last is what the adapters started from, or None.
        base_digest: of the base's weights; None where it has no manifest.
        data, data_digest: what was learned.
        loss_before, loss_after: mean negative log-probability over the windows held out, nats a token.
        steps, planned, best: steps that were done, that were planned, and after how many the best was found.
        windows, held_out, tokens: windows learned from, windows held out, tokens of each.
        start_token: windows began as the tokenizer begins a text.
        answers_only: only what the assistant says was learned, and counts in the losses.
        rank, layers, trained: of the adapters; layers that have one; numbers that were trained.
        dtype: computed in.
        seconds: wall-clock time of this process.
        peak_memory: bytes; None where the system does not tell.
    """

    base: str
    base_digest: str | None
    output: str
    original: str | None
    data: str
    data_digest: str
    loss_before: float
    loss_after: float
    steps: int
    planned: int
    best: int
    windows: int
    held_out: int
    tokens: int
    start_token: bool
    answers_only: bool
    rank: int
    layers: int
    trained: int
    dtype: str
    seconds: float
    peak_memory: int | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, keys as the attributes."""
        return asdict(self)


def finetune(
    folder: str | Path,
    out: str | Path,
    how: Finetuning,
    *,
    start: str | Path | None = None,
    max_memory: int | None = None,
    restart: bool = False,
    revision: str | None = None,
    token: str | None = None,
    team: Team | None = None,
) -> Finetuned:
    """Train adapters on a quantized folder, and write them as PEFT does.

    Args:
        folder: that bitfold quantized, or a Hub repository with one; it is not changed.
        out: the folder to make; must not exist, or be empty.
        how: see `Finetuning`.
        start: the original of the folder, if adapters are to start from what rounding lost.
        max_memory: ceiling on the resident memory of the process, bytes, kept as `distill` keeps it.
        restart: forget what an earlier run that was cut short has finished.
        revision, token: of the Hub repository.
        team: the processes that call this together, each on a share of the windows; they see the same folders.

    Raises:
        BitfoldError: what is wrong, where, and what to do; finished work stays, and the same call goes on with it.
    """
    from bitfold.checkpoints.hub.fetch import resolve

    require_peft()
    started, local = time.monotonic(), resolve(str(folder), revision=revision, token=token)
    source, original = QuantizedSource(local), None if start is None else ModelRef.of(start)
    ModelRef.of(local).require_causal("a causal language model can be finetuned")
    team = team or alone()
    place = shared_output(out, local, team)
    task = _Task(source, original, how, max_memory, team)
    with shared_work(place, task.identity(), task.team, restart=restart) as work:
        facts = task.learn(work, started)
        found = Finetuned(
            **{"base": local.name, "base_digest": weights_digest(local), "output": str(place), **facts},
            original=None if original is None else Path(original.name).name,
            seconds=time.monotonic() - started,
            peak_memory=peak_memory(),
        )
        if isinstance(work, Workspace):
            carry_record(local, work.result, {PART: {**found.to_dict(), "output": None}})
            work.publish()
    return found


class Tuner:
    """A model that learns by its adapters: a `Learner`.

    Args:
        model: PEFT's, around `inner`.
        inner: the model itself.
        windows: int64 (windows, tokens), and how much each prediction counts, see `texts.weighed`; None = all alike.
        blocks: paths of blocks that run once more in the backward pass.
        rate: of the adapters.
    """

    def __init__(self, model: Any, inner: nn.Module, windows: Windows, blocks: list[str], rate: float) -> None:
        self.model, self._inner, self._blocks, self._rate = model, inner, blocks, rate
        self._ids, self._weights = windows
        self._reading = Reading(inner)

    def groups(self) -> list[Group]:
        """The adapters' matrices."""
        return [Group(trained(self.model), self._rate, relative=False)]

    def learn(self, window: int, share: float) -> float:
        """See `Learner`."""
        ids = self._ids[window]
        with torch.enable_grad(), recomputed(self._inner, self._blocks) if self._blocks else nullcontext():
            states = self._reading.states(ids)
            total, gradient = self._reading.mean(states, ids, _surprise(ids, self._weights_of(window)), share)
            states.backward(gradient)
        return total

    def loss(self, window: int) -> float:
        """See `Learner`."""
        return loss_of(self._reading, self._ids[window], self._weights_of(window))

    def _weights_of(self, window: int) -> torch.Tensor | None:
        return None if self._weights is None else self._weights[window]


@torch.no_grad()
def loss_of(reading: Reading, ids: torch.Tensor, weights: torch.Tensor | None = None) -> float:
    """Mean negative log-probability of the tokens of a window, nats; times how much each counts."""
    return reading.mean(reading.states(ids), ids, _surprise(ids, weights), None)[0]


def _surprise(ids: torch.Tensor, weights: torch.Tensor | None) -> Loss:
    def loss(logits: torch.Tensor, some: slice) -> tuple[torch.Tensor, torch.Tensor]:
        found, gradient = surprise_and_gradient(logits, ids[1:][some])
        return (found, gradient) if weights is None else (found * weights[some], gradient.mul_(weights[some, None]))

    return loss


@dataclass(frozen=True)
class _Task:
    """A base, what its adapters start from, and how they are trained."""

    source: QuantizedSource
    original: ModelRef | None
    how: Finetuning
    max_memory: int | None
    team: Team

    def identity(self) -> dict[str, Any]:
        """What decides the bytes of the result."""
        return {
            "source": {"name": self.source.path.name, "files": self.source.fingerprint()},
            "original": None if self.original is None else self.original.fingerprint(),
            "finetuning": {**asdict(self.how), "data": text_digest(self.how.data)},
            "dtype": str(fast_dtype()),
            "processes": self.team.size,
            "version": software(),
        }

    def learn(self, work: Work, started: float) -> dict[str, Any]:
        """Train, write the adapter into the workspace, and say how it went."""
        skeleton, how, dtype = open_skeleton(self.source), self.how, fast_dtype()
        kinds: Any = {"start_token": how.start_token, "answers_only": how.answers_only}
        ids, held_out = held_out_first(self.source.path, how.data, skeleton, how.windows, how.seqlen, **kinds)
        found: Windows = weighed(ids, held_out, how.data) if how.answers_only else (ids, None)
        windows, ceiling = len(ids) - held_out, memory.Ceiling(self.max_memory)
        tuner = self._tuner(found, blocks_of(skeleton))
        ceiling.check()
        steps = how.steps
        if steps is None and how.minutes is None:
            steps = math.ceil(how.epochs * windows / how.batch)
        pace = Pace(steps, how.batch, how.seed, "finetune", "loss")
        course = Course(tuner, pace, (held_out, len(ids)), work, self.team)
        end = None if how.minutes is None else started + 60 * how.minutes
        learned = course.run(lambda: None if end is None else end - time.monotonic(), ceiling.check)
        if self.team.rank == 0:
            save_adapter(tuner.model, learned.values, work.result)
        facts = {"data": without_folders(how.data), "data_digest": text_digest(how.data), **kinds}
        facts |= {"windows": windows, "held_out": held_out, "tokens": ids.shape[1]}
        return {**facts, **_facts_of(learned), "rank": how.rank, "dtype": str(dtype).removeprefix("torch.")}

    def _tuner(self, windows: Windows, blocks: list[str]) -> Tuner:
        """The model with its adapters, in the memory that there is."""
        how, dtype = self.how, fast_dtype()
        model = load_folder(self.source.path, dtype=dtype).requires_grad_(False)
        limit = memory.default_ceiling() if self.max_memory is None else self.max_memory
        wide = how.rank * sum(sum(shape) for shape in _shapes(model))
        fit = fitting(model, blocks, windows[0].shape[1], None if limit is None else limit - _STATE * wide)
        outer = add_adapters(model, how, str(self.source.path))
        if self.original is not None:
            progress.say("adapters start from what rounding lost")
            start_from(model, self.original, how.seed)
        install(model, dtype, keep=fit.keep, rows=False)
        return Tuner(outer, model, windows, blocks if fit.recompute else [], how.rate)


def _shapes(model: nn.Module) -> list[tuple[int, int]]:
    return [(layer.out_features, layer.in_features) for layer in frozen_layers(model).values()]


def _facts_of(learned: Learned) -> dict[str, Any]:
    counts = {"trained": sum(w.numel() for w in learned.values.values()), "layers": len(learned.values) // 2}
    losses = {"loss_before": learned.before, "loss_after": learned.after}
    return {**counts, **losses, "steps": learned.steps, "planned": learned.planned, "best": learned.best}


def say_what_came_of_it(found: Finetuned) -> str:
    """In a line."""
    change = f"held-out loss {found.loss_before:.4f} -> {found.loss_after:.4f}"
    when = f"after {found.best} of {found.planned} steps, in {progress.duration(found.seconds)}"
    return f"{found.output}: {change} {when}"
