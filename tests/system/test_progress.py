"""Progress is silent until enabled, writes to stderr only, and says how far and how long."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from bitfold.system import progress


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = progress.enabled()
    yield
    progress.enable(before)


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock.monotonic)
    return clock


def test_silent_unless_enabled(capsys: pytest.CaptureFixture[str], clock: _Clock) -> None:
    progress.enable(False)
    with progress.bar("work", 10) as shown:
        clock.now += 60
        shown.advance(5)
    assert capsys.readouterr() == ("", "")


def test_lines_off_a_terminal(capsys: pytest.CaptureFixture[str], clock: _Clock) -> None:
    progress.enable()
    with progress.bar("work", 40) as shown:
        shown.advance(1)  # too early for a line
        clock.now = 11
        shown.advance(9, note="layer 3")
        clock.now = 12  # within ten seconds of the last line
        shown.advance(1)
        clock.now = 44
        shown.advance(29)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["work: 25%, 33 s left (layer 3)", "work: done in 44 s"]


def test_a_short_step_writes_no_line(capsys: pytest.CaptureFixture[str], clock: _Clock) -> None:
    progress.enable()
    with progress.bar("work", 2) as shown:
        clock.now = 3
        shown.advance(2)
    assert capsys.readouterr().err == ""


def test_bars_on_a_terminal_nest_and_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress.sys, "stderr", screen)
    progress.enable()

    def work() -> None:
        with progress.bar("outer", 2) as outer, progress.bar("inner", 4) as inner:
            inner.advance(4, note="ready")
            outer.advance()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert progress._display is None
    assert all(word in screen.getvalue() for word in ("outer", "ready", "ETA"))


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")])
def test_durations(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text
