"""In this process, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bitfold.executors.protocol import Executor, Task


class Local:
    """Runs a task when it is waited for."""

    workers, here = 1, True

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self._waiting: list[Task] = []

    def submit(self, task: Task) -> None:
        """See `Executor`."""
        self._waiting.append(task)

    def wait(self) -> tuple[Task, Any]:
        """See `Executor`."""
        task = self._waiting.pop(0)
        return task, task.function(*task.arguments)

    def blind(self, paths: Sequence[str]) -> list[str]:
        """See `Executor`: it is this machine."""
        return []

    def cancel(self) -> None:
        """See `Executor`."""
        self._waiting.clear()

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
