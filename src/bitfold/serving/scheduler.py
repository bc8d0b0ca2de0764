"""Many texts on one decoder: one thread owns it and gives every text that is being written a token in each pass.

A pass reads one token of each such text, and a part of the prompts of those that have just come: as much as keeps the
pass short, so that running texts do not stall. Texts wait in a queue for one of the decoder's sequences, in the order
in which they came; what a sequence still holds of an earlier text is not read again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitfold.errors import BitfoldError
from bitfold.serving.guessing import Guessing
from bitfold.serving.job import Job, Piece
from bitfold.serving.metrics import Metrics
from bitfold.serving.protocol import Steps, common

_LOG = logging.getLogger("bitfold.serving")
_ALONE = 256  # tokens of prompts in a pass in which nothing is written
_LEAST = 32  # and at least in a pass in which something is
_STALL = 0.2  # seconds that such a pass should take at most,
_LONGER = 4  # or so many times as long as one that reads no prompt


class QueueFull(BitfoldError):
    """There are as many texts waiting as may wait."""


class Closed(BitfoldError):
    """The server is shutting down."""


@dataclass
class _Slot:
    """A sequence of the decoder, and who has it."""

    number: int
    job: Job | None = None
    unread: list[int] = field(default_factory=list)  # of the prompt
    last: int | None = None  # the token that is read next, once the prompt is read
    used: int = 0  # when it was given away last


class Scheduler:
    """Runs texts; its own thread is the only one that touches the decoder.

    Args:
        decoder: whose sequences are shared out.
        metrics: what is counted.
        waiting: texts that may wait, at most.
        guessing: where texts repeat themselves; None: never.
    """

    def __init__(self, decoder: Steps, metrics: Metrics, waiting: int = 256, guessing: Guessing | None = None) -> None:
        self._decoder, self._metrics, self._most = decoder, metrics, waiting
        self._slots = [_Slot(i) for i in range(len(decoder.texts))]
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._given = 0
        self._guessing = guessing if decoder.guesses else None
        self._room = 2 * _LEAST  # tokens of prompts in a pass in which something is written
        self._plain = 0.0  # seconds of a pass that reads no prompt, lately
        self._thread = threading.Thread(target=self._run, name="bitfold-scheduler", daemon=True)
        self._thread.start()

    def submit(self, *jobs: Job) -> None:
        """Queue texts: all of them or none.

        Raises:
            QueueFull, Closed: none.
        """
        with self._changed:
            if self._closed:
                raise Closed("the server is shutting down")
            if len(self._queue) + len(jobs) > self._most + sum(slot.job is None for slot in self._slots):
                raise QueueFull(f"{len(self._queue)} requests are waiting already")
            for job in jobs:
                job.clock["asked"] = time.monotonic()
                self._queue.append(job)
            self._count()
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody wants a text any more: it leaves the queue now, or its sequence before the next pass."""
        with self._changed:
            job.gone = True
            if job in self._queue:
                self._queue.remove(job)
                self._count()
            self._changed.notify()

    def idle(self) -> bool:
        """Whether nothing is waiting or being written."""
        with self._changed:
            return not self._queue and all(slot.job is None for slot in self._slots)

    def close(self) -> None:
        """End: what is still running is given up with `Closed`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        with torch.no_grad():
            try:
                while self._admit():
                    self._pass()
            finally:  # nobody may wait for ever, whatever has happened
                self._give_up()

    def _give_up(self) -> None:
        with self._changed:
            self._closed = True
        left = [*self._queue, *(slot.job for slot in self._slots if slot.job is not None)]
        for job in left:
            job.send(Piece(error=Closed("the server is shutting down")))

    def _admit(self) -> bool:
        """Give free sequences to who waits; sleeps while there is nothing to do. False: it is over."""
        with self._changed:
            while True:
                for slot in self._slots:
                    if slot.job is not None and slot.job.gone:
                        self._metrics.ended(slot.job, "cancelled")
                        self._free(slot)
                while self._queue and any(slot.job is None for slot in self._slots):
                    self._try_to_place(self._queue.popleft())
                self._count()
                if self._closed:
                    return False
                if any(slot.job is not None for slot in self._slots):
                    return True
                self._changed.wait()

    def _try_to_place(self, job: Job) -> None:
        try:
            self._place(job)
        except Exception as error:  # of a cache that cannot be cut or copied, say: it is that text's, and nobody else's
            _LOG.exception("a text could not be begun")
            job.send(Piece(error=error))

    def _place(self, job: Job) -> None:
        """A free sequence for a text: the one that holds the longest beginning of it, or the one unused for longest.

        What another sequence holds is copied if it is more: a sequence whose text would lose much is left as it is.
        """
        ids, texts = job.asked.ids, self._decoder.texts
        alike = [common(text, ids) for text in texts]
        best = max(range(len(texts)), key=alike.__getitem__)
        if self._slots[best].job is None and 2 * alike[best] >= len(texts[best]):
            slot = self._slots[best]
        else:
            slot = min((s for s in self._slots if s.job is None), key=lambda s: (s.used, s.number))
            if alike[best] > alike[slot.number]:
                self._decoder.copy(best, slot.number, alike[best])
        self._given += 1
        job.reused = self._decoder.keep(ids, slot.number)
        slot.job, slot.unread, slot.last, slot.used = job, list(ids[job.reused :]), None, self._given
        job.clock["begun"] = time.monotonic()
        self._metrics.began(job)

    def _pass(self) -> None:
        writing = [slot for slot in self._slots if slot.job is not None and not slot.unread]
        work = [(slot.number, [slot.last]) for slot in writing if slot.last is not None]
        room = self._room if writing else _ALONE
        reading: list[_Slot] = []
        for slot in sorted((s for s in self._slots if s.job is not None and s.unread), key=lambda s: s.used):
            if room > 0:
                part, slot.unread = slot.unread[:room], slot.unread[room:]
                room -= len(part)
                work.append((slot.number, part))
                reading.append(slot)
        guesses = self._guess(work, writing, reading)
        counts = [1 + len(guess) for guess in guesses]
        start = time.monotonic()
        try:
            logits = self._decoder.step(work, counts)
        except Exception as error:  # whatever it is, the others must not wait for ever
            self._fail([*writing, *reading], error)
            return
        seconds = time.monotonic() - start
        rows, made = torch.split(logits, counts), 0
        for slot, found, guess in zip([*writing, *reading], rows, guesses, strict=True):
            made += 0 if slot.unread else self._advance(slot, found, guess)
        self._metrics.passed(seconds, made)
        if not reading:
            if self._guessing is not None:
                self._guessing.note(guesses, made, seconds)
            self._plain += 0.2 * (seconds - self._plain)
        elif writing and room == 0:  # twice as many, as long as passes stay short
            long = seconds > max(_STALL, _LONGER * self._plain)
            self._room = max(_LEAST, self._room // 2) if long else min(_ALONE, 2 * self._room)

    def _guess(
        self, work: list[tuple[int, list[int]]], writing: Sequence[_Slot], reading: Sequence[_Slot]
    ) -> list[list[int]]:
        """What is guessed of each text of a pass, and read with it; nothing in passes that read prompts."""
        if self._guessing is None or reading:
            return [[] for _ in work]
        guesses = self._guessing.guess([slot.job for slot in writing if slot.job is not None])
        for (_, ids), guess in zip(work, guesses, strict=True):
            ids += guess
        return guesses

    def _advance(self, slot: _Slot, rows: Tensor, guesses: Sequence[int]) -> int:
        """Choose tokens as long as they are those that were guessed; how many there are."""
        job = slot.job
        assert job is not None
        if job.gone:
            return 0
        if not job.ids:
            job.clock["first"] = time.monotonic()
        text, made = self._decoder.texts[slot.number], 0
        known = len(text) - len(guesses)
        for row, guess in zip(rows, [*guesses, None], strict=True):
            try:
                slot.last = job.advance(row)
            except Exception as error:  # of one text: logits that are no numbers, a grammar that got too complex
                self._fail([slot], error)
                return made
            made += 1
            if slot.last is None or slot.last != guess:
                break
        del text[known + made - 1 :]  # what was guessed in vain
        if slot.last is None:
            self._end(slot)
        return made

    def _fail(self, slots: Sequence[_Slot], error: Exception) -> None:
        _LOG.error("a text failed: %s", error, exc_info=None if isinstance(error, BitfoldError) else error)
        for slot in slots:
            assert slot.job is not None
            slot.job.send(Piece(error=error))
            self._decoder.keep([], slot.number)  # nobody knows what it holds
            self._end(slot, "failed")

    def _end(self, slot: _Slot, how: str = "finished") -> None:
        assert slot.job is not None
        self._metrics.ended(slot.job, how)
        with self._changed:
            self._free(slot)

    def _free(self, slot: _Slot) -> None:
        slot.job, slot.unread, slot.last = None, [], None

    def _count(self) -> None:
        self._metrics.waiting = len(self._queue)
        self._metrics.running = sum(slot.job is not None for slot in self._slots)
