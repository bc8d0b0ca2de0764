"""Devices to test on; and what every run of the tests ends with: how many were skipped, for which reasons."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
import torch.utils.backend_registration

from bitfold.system import backend

# torch.compile would start as many compilers as there are cores, each of which imports PyTorch, for each test process.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.fixture(params=[*backend.present(), "pretended"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The CPU, what accelerators there are, and the pretended one of elsewhere.py."""
    if request.param != "pretended":
        yield torch.device(request.param)
        return
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch has no place for devices written in Python")
    import elsewhere

    with elsewhere.device() as pretended:
        yield pretended


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
