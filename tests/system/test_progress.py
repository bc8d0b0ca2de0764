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


def test_one_time_that_is_left(capsys: pytest.CaptureFixture[str], clock: _Clock) -> None:
    """A step inside another is told of in its lines, with no time of its own."""
    progress.enable()
    with progress.bar("whole", 100, seconds=200) as whole:
        with progress.bar("part", 4) as part:
            for _ in range(3):
                clock.now += 11
                part.advance(1, note="layer 7")
        whole.advance(20)
        clock.now += 11
        whole.advance(20)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "whole: 0%, 3 min 09 s left (part 25%, layer 7)",
        "whole: 0%, 2 min 58 s left (part 50%, layer 7)",
    ]
    assert all(line.count(" left") <= 1 and line.startswith("whole: ") for line in lines)


def test_the_pace_is_believed_the_more_the_more_is_done(clock: _Clock) -> None:
    """An estimate that is twice too short: right at last, never growing between two units."""
    pace = progress.Pace(100, 100)
    assert pace.left() == 100
    errors = []
    for unit in range(1, 100):
        before = pace.left()
        clock.now += 2
        assert before - pace.left() == pytest.approx(min(2, before))
        pace.advance(1)
        errors.append(abs(pace.left() / (2 * (100 - unit)) - 1))
    assert errors[0] == pytest.approx(0.5, abs=0.05)
    assert errors[9] < 0.3
    assert errors[49] < 0.1
    assert errors == sorted(errors, reverse=True)


def test_what_was_done_before_says_nothing_about_the_pace(clock: _Clock) -> None:
    """A run that goes on: nine tenths were there at once."""
    pace = progress.Pace(100, None)
    pace.skip(90)
    assert pace.share == 0.9
    assert pace.left() is None
    clock.now += 5
    pace.advance(5)
    assert pace.left() == 5


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
