"""What every run of the tests ends with: how many were skipped, for which reasons."""

from __future__ import annotations

from collections import Counter

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line a reason, before pytest's own last line."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else str(report.longrepr)
        for report in terminalreporter.getreports("skipped")
    )
    if not reasons:
        terminalreporter.write_line("nothing was skipped")
        return
    terminalreporter.write_line(f"skipped: {reasons.total()}")
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count:6}  {reason}")
