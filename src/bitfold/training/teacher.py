"""What the teacher predicts, window by window, kept on disk: then it need not be in memory beside the student."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bitfold.checkpoints.safetensors import digest_of
from bitfold.checkpoints.shards import sync_file
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
    """

    def __init__(self, work: Work, ids: torch.Tensor, likeliest: int, team: Team | None = None) -> None:
        self._work, self.ids, self._likeliest, self._team = work, ids, likeliest, team or alone()

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
        model: Any = teacher.load("AutoModelForCausalLM", dtype)
        refuse_unknown_tokens(model, self.ids)
        reading = Reading(model)
        with progress.bar("teacher", most) as bar:
            bar.skip(done)
            while done < most and not self._team.told(enough(done)):
                some = range(done, min(done + self._team.size, most))
                mine = [self._write(reading, number, teacher.name, words) for number in some[self._team.rank :][:1]]
                for record in chain.from_iterable(self._team.collected(mine)):
                    self._work.journal.append(record)
                done += len(some)
                bar.advance(len(some))
        del model, reading
        gc.collect()
        memory.trim()  # before the student comes
        return done

    @torch.no_grad()
    def _write(self, reading: Reading, number: int, name: str, words: int | None) -> dict[str, Any]:
        ids, pieces = self.ids[number], []
        states = reading.states(ids)
        for some in reading.pieces(ids):
            logits = reading.logits(states[:, some], ids[some]).float()
            if words not in (None, logits.shape[-1]):
                what = f"predicts {logits.shape[-1]} tokens, the model that learns {words}"
                raise UsageError(what, where=name, hint="is it the right teacher?")
            pieces.append(TopRows.of(logits, self._likeliest))
        reading.forget()
        rows = TopRows.together(pieces)
        if not bool(torch.isfinite(rows.top).all()):
            raise ModelError(f"NaN or infinity in the predictions of window {number + 1}", where=name)
        file = self._file(number)
        save_file({"words": rows.words, "codes": rows.codes, "top": rows.top}, file)
        sync_file(file)
        return {"kind": "teacher", "window": number, "sha256": digest_of(file)}
