"""What the teacher predicts, window by window, kept on disk: then it need not be in memory beside the student."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bitfold.checkpoints.safetensors import digest_of
from bitfold.checkpoints.shards import save_tensors, sync_file
from bitfold.errors import ModelError, UsageError
from bitfold.evaluation.predictions import TopRows
from bitfold.models.model_ref import ModelRef
from bitfold.models.vocabulary import refuse_unknown_tokens
from bitfold.system import memory, progress
from bitfold.system.team import Team, alone
from bitfold.training.reading import Reading
from bitfold.workspace.shared import Work

_FILE = "teacher-{}.safetensors"


class Lessons:
    """The teacher's predictions of all windows.

    Args:
        work: the workspace of the run.
        ids: int64 (windows, tokens), in the order in which they are written.
        likeliest: words of each prediction that are kept.
        team: the processes at it, which share the windows.
        kept: a folder of what this teacher has predicted before, by window: taken from there, and left there.
    """

    def __init__(
        self, work: Work, ids: torch.Tensor, likeliest: int, team: Team | None = None, kept: Path | None = None
    ) -> None:
        self._work, self.ids, self._likeliest, self._team = work, ids, likeliest, team or alone()
        self._kept = kept

    def window(self, number: int) -> TopRows:
        """Of one window, a row for each token but the last."""
        return TopRows(**load_file(self._file(number)))

    def _file(self, number: int) -> Path:
        return self._work.state / _FILE.format(number)

    def written(self) -> int:
        """Windows, from the first on, that an earlier process wrote and that are as it wrote them."""
        known = {record["window"]: record["sha256"] for record in self._work.journal.of_kind("teacher")}
        for number in range(len(self.ids)):
            file = self._file(number)
            if number not in known or not file.is_file() or digest_of(file) != known[number]:
                break
        else:
            number = len(self.ids)
        return int(self._team.told(number))

    def write(
        self, teacher: ModelRef, dtype: torch.dtype, enough: Callable[[int], bool], words: int | None, most: int
    ) -> int:
        """Write what is not there; the number of windows that are there then.

        Args:
            teacher: which model.
            dtype: to compute in.
            enough: of so many windows, asked before each one.
            words: of the student's vocabulary; None = unknown.
            most: windows that are needed, however much time there is.

        Raises:
            UsageError: it has another vocabulary than the student.
            ModelError: it predicts NaN.
        """
        done = self.written()
        if self._team.told(done >= most or enough(done)):
            return done
        opened = _Teacher(teacher, dtype, self.ids)
        with progress.bar("teacher", most) as bar:
            bar.skip(done)
            while done < most and not self._team.told(enough(done)):
                some = range(done, min(done + self._team.size, most))
                mine = [self._write(opened, number, words) for number in some[self._team.rank :][:1]]
                for record in chain.from_iterable(self._team.collected(mine)):
                    self._work.journal.append(record)
                done += len(some)
                bar.advance(len(some))
        del opened
        gc.collect()
        memory.trim()  # before the student comes
        return done

    def _write(self, teacher: _Teacher, number: int, words: int | None) -> dict[str, Any]:
        file, kept = self._file(number), self._kept_file(number, teacher.dtype)
        if kept is not None and kept.is_file():
            _also(kept, file)
        else:
            rows = self._predicted(teacher, number, words)
            save_tensors({"words": rows.words, "codes": rows.codes, "top": rows.top}, file)
            sync_file(file)
            if kept is not None:
                kept.parent.mkdir(exist_ok=True)
                _also(file, kept)
        return {"kind": "teacher", "window": number, "sha256": digest_of(file)}

    def _kept_file(self, number: int, dtype: torch.dtype) -> Path | None:
        """Named by all that decides what is in it, but for the teacher."""
        if self._kept is None:
            return None
        facts = f"{dtype} {self._likeliest}".encode() + self.ids[number].contiguous().numpy().tobytes()
        return self._kept / f"{hashlib.sha256(facts).hexdigest()[:32]}.safetensors"

    @torch.no_grad()
    def _predicted(self, teacher: _Teacher, number: int, words: int | None) -> TopRows:
        ids, pieces, reading = self.ids[number], [], teacher.reading
        states = reading.states(ids)
        for some in reading.pieces(ids):
            # A slice's strides would make the head copy its weights, see `Reading.mean`.
            part = states[:, some].clone(memory_format=torch.contiguous_format)
            logits = reading.logits(part, ids[some]).float()
            if words not in (None, logits.shape[-1]):
                what = f"predicts {logits.shape[-1]} tokens, the model that learns {words}"
                raise UsageError(what, where=teacher.ref.name, hint="is it the right teacher?")
            pieces.append(TopRows.of(logits, self._likeliest))
        reading.forget()
        rows = TopRows.together(pieces)
        if not bool(torch.isfinite(rows.top).all()):
            raise ModelError(f"NaN or infinity in the predictions of window {number + 1}", where=teacher.ref.name)
        return rows


@dataclass(frozen=True)
class _Teacher:
    """A model that is loaded when it is first asked: there may be no need to."""

    ref: ModelRef
    dtype: torch.dtype
    ids: torch.Tensor  # that it will read

    @cached_property
    def reading(self) -> Reading:
        model: Any = self.ref.load("AutoModelForCausalLM", self.dtype)
        refuse_unknown_tokens(model, self.ids)
        return Reading(model)


def _also(file: Path, place: Path) -> None:
    """The whole file at another place as well, without a copy where the file system can."""
    aside = place.with_name(f"{place.name}.partial")
    aside.unlink(missing_ok=True)
    try:
        os.link(file, aside)
    except OSError:  # no hard links here
        shutil.copyfile(file, aside)
    aside.replace(place)
