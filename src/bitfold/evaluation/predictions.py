"""The reference's predictions, kept on disk so that it need not be in memory beside the model that is judged.

A row is a distribution over the vocabulary. Each entry is stored as how far its log-probability lies below that of the
most likely entry, in steps of 40 / 65534 nats; the last code stands for everything more than 35 nats or so below, whose
probability is less than 1e-15 of the largest. What is unlikely matters less, so the steps double every 2.8 nats on
the way down: an entry of probability p contributes p step^2 / 24 to the KL divergence between what was written and
what is read back, which leaves 3e-7 nats on a real model, the floor of the measurement (half-precision
log-probabilities would put it near 1e-5). The most likely entry keeps code 0 to itself, so that top-1 agreement is
exact. Low and high bytes are Huffman-coded apart: 9 to 10 bits an entry.
"""

from __future__ import annotations

import os
import shutil
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from bitfold.errors import CheckpointError, UsageError
from bitfold.system.parallel import parallel_map

RANGE = 40.0
STEP = RANGE / 65534
OCTAVE = 2.77  # nats after which the step doubles
VERSION = 3  # of the file
_BELOW = 65535
_SIGNED = 32768  # taken off codes, which then fit int16
_HEAD = struct.Struct("<II")  # rows, compressed bytes
TOGETHER = 32  # rows compressed by one thread, and compared at once: a few megabytes
_ABANDONED = 86400.0  # seconds after which nobody writes any more
_EXPECTED = 1.3  # bytes an entry, for the question whether the disk has room


class Predictions(Protocol):
    """Distributions over the vocabulary, one for each prediction, in the order of the text."""

    def take(self, rows: int) -> torch.Tensor:
        """The next float32 log-probabilities (rows, vocabulary)."""
        ...


def pack_rows(logits: torch.Tensor) -> torch.Tensor:
    """uint16 codes (as int32) of the rows of float32 logits or log-probabilities (rows, vocabulary)."""
    top, best = logits.max(-1, keepdim=True)
    steps = (top - logits).mul_(1 / STEP).clamp_(1, _BELOW)
    grain = torch.exp2((steps * (STEP / OCTAVE)).floor_())
    codes = (steps / grain).round_().mul_(grain).clamp_(1, _BELOW).to(torch.int32)
    codes[steps >= _BELOW - 1] = _BELOW
    return codes.scatter_(-1, best, 0)


def unpack_rows(codes: torch.Tensor) -> torch.Tensor:
    """float32 log-probabilities of codes (whole numbers of any dtype); -inf for what was too unlikely to store."""
    steps = codes.float()
    # Rare: most logits span less than 40 nats, and the comparison costs a pass.
    below = steps == _BELOW if float(steps.max()) == _BELOW else None
    logits = steps * -STEP
    if below is not None:
        logits.masked_fill_(below, -torch.inf)
    return torch.log_softmax(logits, -1)


@dataclass(frozen=True)
class TopRows:
    """Of each distribution the likeliest words, and with them the probability of all others together.

    Args:
        words: int32 (rows, k), likeliest first.
        codes: int16 (rows, k), those of `pack_rows` less 32768: how far each lies below the first.
        top: float32 (rows,), log-probability of the first.
    """

    words: torch.Tensor
    codes: torch.Tensor
    top: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, k: int) -> TopRows:
        """Of float32 logits (rows, vocabulary)."""
        values, words = logits.topk(min(k, logits.shape[-1]))
        total = (logits - values[:, :1]).exp_().sum(-1)
        return cls(words.to(torch.int32), (pack_rows(values) - _SIGNED).to(torch.int16), -total.log())

    @classmethod
    def together(cls, parts: Sequence[TopRows]) -> TopRows:
        """Rows after rows."""
        return cls(*(torch.cat([getattr(p, name) for p in parts]) for name in ("words", "codes", "top")))

    def part(self, some: slice) -> TopRows:
        """Some of the rows."""
        return TopRows(self.words[some], self.codes[some], self.top[some])

    @property
    def log_probabilities(self) -> torch.Tensor:
        """float32 (rows, k) of the words."""
        return self.top[:, None] - (self.codes.float() + _SIGNED) * STEP


def _compress(logits: torch.Tensor) -> bytes:
    codes = pack_rows(logits).numpy().astype("<u2")
    planes = np.ascontiguousarray(codes.view(np.uint8).reshape(-1, 2).T)
    coder = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    data = coder.compress(planes.tobytes()) + coder.flush()
    return _HEAD.pack(codes.shape[0], len(data)) + data


def _decompress(data: bytes, rows: int, vocabulary: int) -> torch.Tensor:
    planes = np.frombuffer(zlib.decompress(data, -15), dtype=np.uint8).reshape(2, rows, vocabulary)
    codes = planes[1].astype(np.uint16) << np.uint16(8)
    codes |= planes[0]
    return unpack_rows(torch.from_numpy(codes.astype(np.float32)))


class DiskPredictions:
    """Rows of a file that `Writer` wrote, read from its start.

    Args:
        path: the file.
        vocabulary: entries of a row.
    """

    def __init__(self, path: Path, vocabulary: int) -> None:
        self.path, self.vocabulary = path, vocabulary
        self._chunks = self._read()
        self._left = torch.empty(0, vocabulary)

    def _read(self) -> Iterator[torch.Tensor]:
        with self.path.open("rb") as file:
            while head := file.read(_HEAD.size):
                try:
                    rows, size = _HEAD.unpack(head)
                    yield _decompress(file.read(size), rows, self.vocabulary)
                except (struct.error, zlib.error, ValueError) as error:
                    raise self._damaged() from error

    def _damaged(self) -> CheckpointError:
        return CheckpointError("the stored predictions are truncated or damaged", where=str(self.path),
                               hint="delete the file")  # fmt: skip

    def take(self, rows: int) -> torch.Tensor:
        """See `Predictions`."""
        parts, missing = [self._left], rows - len(self._left)
        while missing > 0:
            chunk = next(self._chunks, None)
            if chunk is None:
                raise self._damaged()
            parts.append(chunk)
            missing -= len(chunk)
        found = torch.cat(parts) if len(parts) > 1 else self._left
        self._left = found[rows:]
        return found[:rows]


class Writer:
    """Appends rows to a file that becomes visible under its name only when it is whole.

    Several processes may write the same predictions into one folder at a time: each has a file of its own until then.
    """

    def __init__(self, path: Path, total_rows: int) -> None:
        self.path, self.total_rows = path, total_rows
        self.partial = partial_of(path)
        for other in path.parent.glob(f"{path.name}.*.partial"):
            if time.time() - other.stat().st_mtime > _ABANDONED:
                other.unlink(missing_ok=True)
        self._file = self.partial.open("wb")
        self._checked = False

    def append(self, logits: torch.Tensor) -> None:
        """Write rows of float32 logits (rows, vocabulary).

        Raises:
            UsageError: the disk has no room for all rows; found out before the first is written.
        """
        if not self._checked:
            _require_space(self.path, int(_EXPECTED * self.total_rows * int(logits.shape[-1])))
            self._checked = True
        for data in parallel_map(_compress, torch.split(logits, TOGETHER)):
            self._file.write(data)

    def close(self, *, complete: bool) -> None:
        """Give the file its name, or remove it."""
        self._file.close()
        if complete:
            self.partial.replace(self.path)
        else:
            self.partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """Where this process writes a file until it is whole."""
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


def _require_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise UsageError(
            f"the reference's predictions take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            where=str(path.parent),
            hint="evaluate fewer tokens (--max-tokens), or name a folder on a larger disk (--cache-dir)",
        )
