"""Executors by what `--executor` says."""

from __future__ import annotations

from bitfold.errors import UsageError
from bitfold.executors.local import Local
from bitfold.executors.processes import Processes
from bitfold.executors.protocol import Executor

LOCAL, PROCESSES = "local", "processes"


def check_executor(text: str, workers: int | None) -> None:
    """UsageError for an executor that there is not, or workers that nobody would count."""
    if text not in (LOCAL, PROCESSES):
        raise UsageError(f"unknown executor {text!r}", where="--executor", hint="local or processes")
    if workers is not None and text != PROCESSES:
        raise UsageError("only processes are counted", where="--workers", hint="--executor processes")
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers do no work", where="--workers", hint="1 or more")


def open_executor(text: str, workers: int | None) -> Executor:
    """A context, see `Executor`.

    Args:
        text: local or processes.
        workers: how many processes; None: one for each core.

    Raises:
        UsageError: see `check_executor`.
    """
    check_executor(text, workers)
    return Local() if text == LOCAL else Processes(workers)
