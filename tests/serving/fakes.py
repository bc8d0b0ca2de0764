"""A decoder that says what it is told, and notes how it is used."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bitfold.engine.sampling import Sampler, Sampling
from bitfold.engine.stream import TextStream
from bitfold.serving.job import Asked, Job, Piece
from bitfold.serving.protocol import common
from tiny_lm import tokenizer

VOCABULARY, END = 257, 256


def until(condition: Callable[[], object]) -> None:
    """Wait for it: an answer is there a moment before its place is free. At most half a minute."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def next_token(text: Sequence[int]) -> int:
    """What follows a text: something that depends on all of it, and is a letter."""
    return 64 + (7 * len(text) + sum(text)) % 26


class FakeDecoder:
    """Of each sequence the next token is `following`'s of the whole text."""

    cache_bytes = working_bytes = 0
    vocabulary = VOCABULARY
    guesses = True

    def __init__(
        self, sequences: int, positions: int = 1000, following: Callable[[Sequence[int]], int] = next_token
    ) -> None:
        self.positions, self._following = positions, following
        self.texts: list[list[int]] = [[] for _ in range(sequences)]
        self.passes: list[list[tuple[int, int]]] = []  # sequence, tokens
        self.copies: list[tuple[int, int, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.broken: Exception | None = None

    def keep(self, ids: Sequence[int], sequence: int = 0) -> int:
        found = common(self.texts[sequence], ids)
        del self.texts[sequence][found:]
        return found

    def copy(self, source: int, target: int, tokens: int) -> None:
        self.copies.append((source, target, tokens))
        self.texts[target] = self.texts[source][:tokens]

    def step(self, work: Sequence[tuple[int, Sequence[int]]], wanted: Sequence[int] | None = None) -> Tensor:
        assert self.gate.wait(30)
        assert len({sequence for sequence, _ in work}) == len(work)
        assert all(ids for _, ids in work)
        self.passes.append([(sequence, len(ids)) for sequence, ids in work])
        if self.broken is not None:
            error, self.broken = self.broken, None
            raise error
        rows = []
        for (sequence, ids), last in zip(work, wanted or [1] * len(work), strict=True):
            text = self.texts[sequence]
            for i, token in enumerate(ids):
                text.append(token)
                if i >= len(ids) - last:
                    rows.append(torch.zeros(VOCABULARY))
                    rows[-1][self._following(text)] = 20.0
            assert len(text) <= self.positions
        return torch.stack(rows)


class Text:
    """A job, and what came of it."""

    def __init__(self, ids: Sequence[int], limit: int = 10, sampling: Sampling | None = None) -> None:
        self.pieces: list[Piece] = []
        self.ended = threading.Event()
        asked = sampling or Sampling()
        stream = TextStream(tokenizer(), asked.stop)
        self.job = Job(Asked(ids, limit, frozenset({END})), Sampler(asked, ids), stream, self._receive)
        self.ids = ids

    def _receive(self, piece: Piece) -> None:
        self.pieces.append(piece)
        if piece.finish is not None or piece.error is not None:
            self.ended.set()

    def wait(self) -> str:
        assert self.ended.wait(30), "it never ended"
        return "".join(piece.text for piece in self.pieces)

    def expected(self, following: Callable[[Sequence[int]], int] = next_token) -> str:
        """One token after the other, alone."""
        text = list(self.ids)
        for _ in range(self.job.asked.limit):
            text.append(following(text))
        return str(tokenizer().decode(text[len(self.ids) :]))
