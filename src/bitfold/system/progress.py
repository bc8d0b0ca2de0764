"""One way to show how far a long step is: a bar with an ETA on a terminal, a line now and then elsewhere.

There is one time that is left, that of the outermost step. Steps inside it say how far they are, and no time.

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
_TRUSTED = 0.1  # share of a step for which its estimate counts as much as what was measured

_enabled = False


class Bar(Protocol):
    """What `bar` yields."""

    def advance(self, n: float = 1, note: str = "") -> None:
        """Count `n` more units as done; `note` is shown beside the bar (the tensor at hand, a running mean ...)."""
        ...

    def skip(self, n: float) -> None:
        """Count `n` units as done before this step began: they say nothing about its pace."""
        ...


def enable(on: bool = True) -> None:
    """Show progress from now on (or, with False, stop showing it)."""
    global _enabled
    _enabled = on


def enabled() -> bool:
    """Whether progress is shown."""
    return _enabled


@contextmanager
def bar(label: str, total: float, seconds: float | None = None) -> Iterator[Bar]:
    """Show a step of `total` units (tensors, bytes, tokens: any unit) while the block runs.

    Bars may be nested: those inside another one have no time of their own. Silent unless `enable()` was called.

    Args:
        label: what is done.
        total: units.
        seconds: that all of them will take, by an estimate; then units are to be proportional to time.
    """
    if not _enabled:
        yield _Silent()
    elif _on_terminal(sys.stderr):
        with _rich_bar(label, total, seconds) as shown:
            yield shown
    elif _outermost is not None:
        yield _Inside(_outermost, label, total)
    else:
        with _lines(label, total, seconds) as shown:
            yield shown


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


class Pace:
    """How long a step will still take: an estimate at first, then more and more what was measured.

    Args:
        total: units of the step.
        seconds: that they will take, by an estimate; None = there is none.
    """

    def __init__(self, total: float, seconds: float | None) -> None:
        self.total, self.done, self._skipped = total, 0.0, 0.0
        self._expected = None if seconds is None or total <= 0 else seconds / total
        self._start = self._told = time.monotonic()
        self._left = seconds

    @property
    def share(self) -> float:
        """Of the step that is done, 0 to 1."""
        return min(1.0, (self.done + self._skipped) / self.total) if self.total > 0 else 1.0

    def skip(self, n: float) -> None:
        """Units that were done before."""
        self._skipped += n
        self._tell()

    def advance(self, n: float) -> None:
        """Units that are done."""
        self.done += n
        self._tell()

    def _tell(self) -> None:
        """Between two calls the time that is left is counted down, so that no long unit lets it grow."""
        self._told = time.monotonic()
        elapsed, rest = self._told - self._start, max(0.0, self.total - self.done - self._skipped)
        if self._expected is None:
            self._left = elapsed * rest / self.done if self.done > 0 else None
            return
        trusted = _TRUSTED * (self.total - self._skipped)
        measured = (elapsed + trusted * self._expected) / (self.done + trusted) if self.done + trusted > 0 else 0.0
        self._left = measured * rest

    def left(self) -> float | None:
        """Seconds; None while nobody knows."""
        return None if self._left is None else max(0.0, self._left - (time.monotonic() - self._told))


class _Silent:
    def advance(self, n: float = 1, note: str = "") -> None:
        """Nothing to show."""

    def skip(self, n: float) -> None:
        """Nothing to show."""


class _Lines:
    """Progress for logs: at most one line in SECONDS_BETWEEN_LINES, and one at the end if any was written before."""

    def __init__(self, label: str, total: float, seconds: float | None, stream: TextIO) -> None:
        self.label, self.stream, self.pace = label, stream, Pace(total, seconds)
        self.start = self.last = time.monotonic()
        self.wrote = False

    def advance(self, n: float = 1, note: str = "") -> None:
        self.pace.advance(n)
        if self.pace.share < 1:
            self.show(note)

    def skip(self, n: float) -> None:
        self.pace.skip(n)

    def show(self, note: str) -> None:
        """A line, if it is time for one."""
        now = time.monotonic()
        if now - self.last < SECONDS_BETWEEN_LINES:
            return
        self.last, left = now, self.pace.left()
        eta = f", {duration(left)} left" if left is not None else ""
        self._write(f"{100 * self.pace.share:.0f}%{eta}" + (f" ({note})" if note else ""))

    def finish(self) -> None:
        if self.wrote:
            self._write(f"done in {duration(time.monotonic() - self.start)}")

    def _write(self, text: str) -> None:
        self.wrote = True
        print(f"{self.label}: {text}", file=self.stream, flush=True)


class _Inside:
    """A step inside another one: it is told of in the lines of the outermost."""

    def __init__(self, outer: _Lines, label: str, total: float) -> None:
        self._outer, self._label, self._pace = outer, label, Pace(total, None)

    def advance(self, n: float = 1, note: str = "") -> None:
        self._pace.advance(n)
        self._outer.show(f"{self._label} {100 * self._pace.share:.0f}%" + (f", {note}" if note else ""))

    def skip(self, n: float) -> None:
        self._pace.skip(n)


_outermost: _Lines | None = None


@contextmanager
def _lines(label: str, total: float, seconds: float | None) -> Iterator[Bar]:
    global _outermost
    _outermost = lines = _Lines(label, total, seconds, sys.stderr)
    try:
        yield lines
        lines.finish()
    finally:
        _outermost = None


class _RichBar:
    def __init__(self, display: Progress, task: TaskID, pace: Pace) -> None:
        self._display, self._task, self._pace = display, task, pace

    def advance(self, n: float = 1, note: str = "") -> None:
        self._pace.advance(n)
        self._display.update(self._task, advance=n, note=note)

    def skip(self, n: float) -> None:
        self._pace.skip(n)
        self._display.update(self._task, advance=n)


_display: Progress | None = None
_open_bars = 0


@contextmanager
def _rich_bar(label: str, total: float, seconds: float | None) -> Iterator[Bar]:
    """A task of the one rich display of the process: rich allows a single live display at a time."""
    global _display, _open_bars
    if _display is None:
        _display = _new_display()
        _display.start()
    display, pace = _display, Pace(total, seconds)
    task = display.add_task(label, total=total, note="", pace=pace if _open_bars == 0 else None)
    _open_bars += 1
    try:
        yield _RichBar(display, task, pace)
    finally:
        _open_bars -= 1
        if _open_bars == 0:
            display.stop()
            _display = None


def _new_display() -> Progress:
    from rich import progress
    from rich.console import Console
    from rich.text import Text

    class Left(progress.ProgressColumn):
        """Time that is left, of the outermost step."""

        def render(self, task: progress.Task) -> Text:
            left = None if task.fields["pace"] is None else task.fields["pace"].left()
            return Text("" if left is None else f"ETA {duration(left)}")

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeElapsedColumn(),
        Left(),
        progress.TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )
