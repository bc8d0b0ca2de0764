"""What the server counts, in Prometheus' text format (exposition format 0.0.4)."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bitfold.serving.job import Job

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Histogram:
    """Counts of values up to each bound; `_bucket`, `_sum` and `_count` of Prometheus."""

    def __init__(self, bounds: Sequence[float] = _SECONDS) -> None:
        self._bounds, self._counts = bounds, [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """One more value."""
        at = next((i for i, bound in enumerate(self._bounds) if value <= bound), len(self._bounds))
        self._counts[at] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        """As Prometheus reads them."""
        below = 0
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {self._sum}"
        yield f"{name}_count {below}"


@dataclass
class Metrics:
    """Counted by the scheduler's thread and by the server's; read by anyone."""

    running: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    passes: int = 0
    busy_seconds: float = 0.0
    texts: Counter[str] = field(default_factory=Counter)
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    first_token: Histogram = field(default_factory=Histogram)
    whole: Histogram = field(default_factory=Histogram)
    queued: Histogram = field(default_factory=Histogram)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def began(self, job: Job) -> None:
        """A text has left the queue."""
        with self._lock:
            self.prompt_tokens += len(job.asked.ids)
            self.reused_tokens += job.reused
            self.queued.add(job.clock["begun"] - job.clock["asked"])

    def passed(self, seconds: float, written: int) -> None:
        """A pass of the decoder, which writes a token of so many texts."""
        with self._lock:
            self.passes += 1
            self.busy_seconds += seconds
            self.generated_tokens += written

    def ended(self, job: Job, how: str) -> None:
        """A text that was begun is over: "finished", "failed" or "cancelled"."""
        with self._lock:
            self.texts[how] += 1
            if "first" in job.clock:
                self.first_token.add(job.clock["first"] - job.clock["asked"])
            if how == "finished":
                self.whole.add(time.monotonic() - job.clock["asked"])

    def answered(self, path: str, status: int) -> None:
        """A request has its answer."""
        with self._lock:
            self.answers[path, status] += 1

    def exposition(self) -> str:
        """All of it, as text."""
        with self._lock:
            return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        for name, kind, value, text in (
            ("texts_running", "gauge", self.running, "Texts that are being written."),
            ("texts_waiting", "gauge", self.waiting, "Texts in the queue."),
            ("prompt_tokens_total", "counter", self.prompt_tokens, "Tokens of prompts."),
            ("reused_tokens_total", "counter", self.reused_tokens, "Of which were still in the cache."),
            ("generated_tokens_total", "counter", self.generated_tokens, "Tokens that were written."),
            ("passes_total", "counter", self.passes, "Passes through the model."),
            ("busy_seconds_total", "counter", self.busy_seconds, "Time that they took."),
        ):
            yield from _head(name, kind, text)
            yield f"bitfold_{name} {value}"
        yield from _head("texts_total", "counter", "Texts that are over, by how they ended.")
        for how in ("finished", "failed", "cancelled"):
            yield f'bitfold_texts_total{{end="{how}"}} {self.texts[how]}'
        yield from _head("requests_total", "counter", "Requests, by path and status.")
        for (path, status), count in sorted(self.answers.items()):
            yield f'bitfold_requests_total{{path="{path}",status="{status}"}} {count}'
        for name, histogram, text in (
            ("queue_seconds", self.queued, "From the request until the text is begun."),
            ("first_token_seconds", self.first_token, "From the request to its first token."),
            ("text_seconds", self.whole, "From the request to its last token."),
        ):
            yield from _head(name, "histogram", text)
            yield from histogram.lines(f"bitfold_{name}")


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP bitfold_{name} {text}"
    yield f"# TYPE bitfold_{name} {kind}"
