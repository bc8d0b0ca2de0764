"""What the teacher predicts, window by window, kept on disk: then it need not be in memory beside the student."""

from __future__ import annotations

import gc
from collections.abc import Callable
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
from bitfold.training.reading import Reading
from bitfold.workspace.folder import Workspace

_FILE = "teacher-{}.safetensors"


class Lessons:
    """The teacher's predictions of all windows.

    Args:
        work: the workspace of the run.
        ids: int64 (windows, tokens), in the order in which they are written.
        likeliest: words of each prediction that are kept.
    """

    def __init__(self, work: Workspace, ids: torch.Tensor, likeliest: int) -> None:
        self._work, self.ids, self._likeliest = work, ids, likeliest

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
                return number
        return len(self.ids)

    def write(self, teacher: ModelRef, dtype: torch.dtype, enough: Callable[[int], bool], words: int | None) -> int:
        """Write what is not there; the number of windows that are there then.

        Args:
            teacher: which model.
            dtype: to compute in.
            enough: of so many windows, asked before each one.
            words: of the student's vocabulary; None = unknown.

        Raises:
            UsageError: it has another vocabulary than the student.
            ModelError: it predicts NaN.
        """
        done = self.written()
        if done == len(self.ids) or enough(done):
            return done
        model: Any = teacher.load("AutoModelForCausalLM", dtype)
        refuse_unknown_tokens(model, self.ids)
        reading = Reading(model)
        with progress.bar("teacher", len(self.ids)) as bar:
            bar.skip(done)
            while done < len(self.ids) and not enough(done):
                self._write(reading, done, teacher.name, words)
                done += 1
                bar.advance(1)
        del model, reading
        gc.collect()
        memory.trim()  # before the student comes
        return done

    @torch.no_grad()
    def _write(self, reading: Reading, number: int, name: str, words: int | None) -> None:
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
        self._work.journal.append({"kind": "teacher", "window": number, "sha256": digest_of(file)})
