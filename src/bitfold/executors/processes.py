"""In other processes of this machine (`multiprocessing`, spawned: PyTorch's threads do not survive a fork).

Each worker has a pipe of its own. One that is killed costs the task it had, and is replaced; when the process that
started them goes away, they go as well, whatever it died of.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from bitfold.errors import BitfoldError
from bitfold.executors.protocol import TRIES, Executor, Task, carried_out, died

_BEGIN = 'in a script, call it below `if __name__ == "__main__":`, for each worker imports the script'


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shared_threads(workers: int) -> int:
    """Threads of each of so many workers: all together no more than there are cores, each no more than PyTorch has."""
    import torch

    return max(1, min(torch.get_num_threads(), cores() // workers))


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    task: Task | None = None
    greeted: bool = False  # whether it came as far as its first task


class Processes:
    """Of this machine.

    Args:
        workers: how many; None: one for each core.
    """

    here = False

    def __init__(self, workers: int | None) -> None:
        self.workers = cores() if workers is None else workers
        self.threads = shared_threads(self.workers)
        self._context = multiprocessing.get_context("spawn")
        self._all: list[_Worker] = []
        self._waiting: deque[Task] = deque()
        self._tries: dict[str, int] = {}

    def submit(self, task: Task) -> None:
        """See `Executor`."""
        self._waiting.append(task)
        self._hand_out()

    def _hand_out(self) -> None:
        """Give the tasks that wait to workers that are idle, the first ones first."""
        while self._waiting:
            idle = next((w for w in self._all if w.task is None), None)
            if idle is None and len(self._all) < self.workers:
                idle = self._started()
            if idle is None:
                return
            idle.task = self._waiting.popleft()
            try:
                idle.pipe.send((idle.task.function, idle.task.arguments))
            except OSError:
                self._lost(idle)

    def _started(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self.threads), daemon=True)
        process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self._all.append(worker)
        return worker

    def wait(self) -> tuple[Task, Any]:
        """See `Executor`."""
        while True:
            self._hand_out()
            busy = {w.pipe: w for w in self._all if w.task is not None}
            assert busy, "nothing was handed over"
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                try:
                    fine, answer = worker.pipe.recv()
                except (EOFError, OSError):
                    self._lost(worker)
                    continue
                task, worker.task, worker.greeted = worker.task, None, True
                assert task is not None
                if fine:
                    self._hand_out()
                    return task, answer
                self._failed(task, answer)

    def _failed(self, task: Task, error: BaseException) -> None:
        """Storage has been waited for; what else a task raises, it would raise again."""
        if isinstance(error, OSError):
            raise died(task, TRIES, f"{type(error).__name__}: {error}") from error
        raise error

    def _lost(self, worker: _Worker) -> None:
        """Its process is gone: another one will take its task."""
        self._all.remove(worker)
        worker.pipe.close()
        worker.process.join(5)
        code, task = worker.process.exitcode, worker.task
        if task is None:
            return
        cause = f"its process ended with exit code {code}"
        if code is not None and code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
            cause = f"its process was killed by {name}"
            if -code == getattr(signal, "SIGKILL", None):
                cause += ", as systems do that are short of memory"
        elif not worker.greeted:
            cause += f" ({_BEGIN})"
        self._again(task, cause)

    def _again(self, task: Task, cause: str) -> None:
        self._tries[task.name] = self._tries.get(task.name, 0) + 1
        if self._tries[task.name] >= TRIES:
            raise died(task, TRIES, cause)
        self._waiting.append(task)

    def blind(self, paths: Sequence[str]) -> list[str]:
        """See `Executor`: it is this machine."""
        return []

    def cancel(self) -> None:
        """See `Executor`."""
        self._waiting.clear()
        for worker in [w for w in self._all if w.task is not None]:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()
            self._all.remove(worker)

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        for worker in self._all:
            worker.pipe.close()  # it reads the end of its tasks there
        for worker in self._all:
            worker.process.join(5)
            worker.process.kill()
            worker.process.join()  # until then its times are not counted among those of children
        self._all.clear()


def _serve(pipe: Connection, threads: int) -> None:
    """What a worker does: task after task, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; whoever started us ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    while True:
        try:
            function, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer: tuple[bool, Any] = True, carried_out(function, arguments)
        except Exception as error:
            answer = False, _sendable(error)
        pipe.send(answer)


def _sendable(error: Exception) -> Exception:
    """The error itself where it is meant for people or tells of storage; of others what a reader of logs needs."""
    if isinstance(error, BitfoldError | OSError):
        return error
    return RuntimeError(f"a task failed:\n{traceback.format_exc()}")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
