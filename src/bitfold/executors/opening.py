"""Executors by what `--executor` says."""

from __future__ import annotations

from bitfold.errors import UsageError
from bitfold.executors.local import Local
from bitfold.executors.processes import Processes
from bitfold.executors.protocol import Executor
from bitfold.executors.ray_cluster import RayCluster, check_installed

LOCAL, PROCESSES, RAY = "local", "processes", "ray"


def check_executor(text: str, workers: int | None) -> None:
    """UsageError for an executor that there is not, or workers that nobody would count."""
    name, colon, address = text.partition(":")
    if name not in (LOCAL, PROCESSES, RAY) or (colon and (name != RAY or not address)):
        hint = "local, processes, ray or ray:ADDRESS"
        raise UsageError(f"unknown executor {text!r}", where="--executor", hint=hint)
    if name == RAY:
        check_installed()
    if workers is not None and text != PROCESSES:
        raise UsageError("only processes are counted", where="--workers", hint="--executor processes")
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers do no work", where="--workers", hint="1 or more")


def open_executor(text: str, workers: int | None) -> Executor:
    """A context, see `Executor`.

    Args:
        text: local, processes, ray (started on this machine), ray:ADDRESS (of the head of a cluster).
        workers: how many processes; None: one for each core.

    Raises:
        UsageError: see `check_executor`.
        ResourceError: the cluster cannot be reached.
    """
    check_executor(text, workers)
    if text == LOCAL:
        return Local()
    return Processes(workers) if text == PROCESSES else RayCluster(text.partition(":")[2] or None)
