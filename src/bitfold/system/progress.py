"""One way to show how far a long step is: a bar with an ETA on a terminal, a line now and then elsewhere.

Library code calls `bar` freely: it prints nothing until the program that owns the terminal says `enable()`, as the
command line does. Everything goes to stderr, so that stdout stays the command's result (a table or one JSON object).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SECONDS_BETWEEN_LINES = 10.0

_enabled = False


class Bar(Protocol):
    """What `bar` yields."""

    def advance(self, n: float = 1, note: str = "") -> None:
        """Count `n` more units as done; `note` is shown beside the bar (the tensor at hand, a running mean ...)."""
        ...


def enable(on: bool = True) -> None:
    """Show progress from now on (or, with False, stop showing it)."""
    global _enabled
    _enabled = on


def enabled() -> bool:
    """Whether progress is shown."""
    return _enabled


@contextmanager
def bar(label: str, total: float) -> Iterator[Bar]:
    """Show a step of `total` units (tensors, bytes, tokens: any unit) while the block runs.

    Bars may be nested; off a terminal each then writes its own lines. Silent unless `enable()` was called.
    """
    if not _enabled:
        yield _Silent()
    elif _on_terminal(sys.stderr):
        with _rich_bar(label, total) as shown:
            yield shown
    else:
        lines = _Lines(label, total, sys.stderr)
        yield lines
        lines.finish()


def say(text: str) -> None:
    """One line for the user about what is going on; silent unless `enable()` was called."""
    if _enabled:
        print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as people say them: `7 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _on_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class _Silent:
    def advance(self, n: float = 1, note: str = "") -> None:
        """Nothing to show."""


class _Lines:
    """Progress for logs: at most one line in SECONDS_BETWEEN_LINES, and one at the end if any was written before."""

    def __init__(self, label: str, total: float, stream: TextIO) -> None:
        self.label, self.total, self.stream = label, total, stream
        self.done = 0.0
        self.start = self.last = time.monotonic()
        self.wrote = False

    def advance(self, n: float = 1, note: str = "") -> None:
        self.done += n
        now = time.monotonic()
        if now - self.last >= SECONDS_BETWEEN_LINES and self.done < self.total:
            self.last = now
            left = (now - self.start) * (self.total - self.done) / self.done if self.done > 0 else None
            eta = f", {duration(left)} left" if left is not None else ""
            self._write(f"{100 * self.done / self.total:.0f}%{eta}" + (f" ({note})" if note else ""))

    def finish(self) -> None:
        if self.wrote:
            self._write(f"done in {duration(time.monotonic() - self.start)}")

    def _write(self, text: str) -> None:
        self.wrote = True
        print(f"{self.label}: {text}", file=self.stream, flush=True)


class _RichBar:
    def __init__(self, display: Progress, task: TaskID) -> None:
        self._display, self._task = display, task

    def advance(self, n: float = 1, note: str = "") -> None:
        self._display.update(self._task, advance=n, note=note)


_display: Progress | None = None
_open_bars = 0


@contextmanager
def _rich_bar(label: str, total: float) -> Iterator[Bar]:
    """A task of the one rich display of the process: rich allows a single live display at a time."""
    global _display, _open_bars
    if _display is None:
        _display = _new_display()
        _display.start()
    display = _display
    task = display.add_task(label, total=total, note="")
    _open_bars += 1
    try:
        yield _RichBar(display, task)
    finally:
        _open_bars -= 1
        if _open_bars == 0:
            display.stop()
            _display = None


def _new_display() -> Progress:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("ETA"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )
