"""What the engines that run tasks have in common: hand one over, wait for any, let go of all.

A task is a function that can be imported, with small arguments: names, paths, numbers. It answers with something small
as well; what is large lies in files. It may be run twice, or be cut off at any moment, and must leave nothing that
looks whole. An engine tries a task again when the process or the machine under it goes away, and after a while when
storage fails for a moment.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bitfold.errors import BitfoldError, ResourceError

TRIES = 3  # of a task that dies
_LASTS = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENOENT}
WAIT = 0.5  # seconds before storage that failed is tried a second time; twice as many before each further one


@dataclass(frozen=True)
class Needs:
    """What a task takes while it runs.

    Args:
        cores: threads that it may use.
        memory: bytes of resident memory of its process, libraries included.
    """

    cores: int = 1
    memory: int = 0


@dataclass(frozen=True)
class Task:
    """A piece of work.

    Args:
        name: for errors and logs.
        function: importable, so that another process finds it.
        arguments: of it; small, and can be pickled.
        needs: what it takes.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    needs: Needs


class Executor(Protocol):
    """Runs tasks. A context: leaving it ends whatever still runs.

    `workers`: tasks that run at a time, now. `threads`: of each.
    """

    threads: int
    here: bool  # whether tasks run in this very process

    @property
    def workers(self) -> int:
        """Tasks that run at a time."""
        ...

    def submit(self, task: Task) -> None:
        """Hand a task over."""
        ...

    def wait(self) -> tuple[Task, Any]:
        """Any task that is done, and its answer.

        Raises:
            ResourceError: a task died as often as it may; the error names it and the cause.
            Exception: what the task raised.
        """
        ...

    def blind(self, paths: Sequence[str]) -> list[str]:
        """Names of machines that do not see some of these files or folders."""
        ...

    def cancel(self) -> None:
        """Let go of everything that was handed over, what runs included."""
        ...

    def __enter__(self) -> Executor: ...
    def __exit__(self, *_: object) -> None: ...


def run_all(executor: Executor, tasks: Iterable[Task]) -> Iterator[tuple[Task, Any]]:
    """Answers as they come. No more than twice as many tasks as can run are handed over at a time, so that what comes
    late can still go to a machine that joined, and answers do not pile up."""
    waiting, running = iter(tasks), 0
    ended = False
    try:
        while True:
            while not ended and running < 2 * max(1, executor.workers):
                task = next(waiting, None)
                if task is None:
                    ended = True
                    break
                executor.submit(task)
                running += 1
            if not running:
                return
            done = executor.wait()
            running -= 1
            yield done
    except BaseException:
        executor.cancel()
        raise


def carried_out(
    function: Callable[..., Any], arguments: tuple[Any, ...], sleep: Callable[[float], object] = time.sleep
) -> Any:
    """What a task answers, where it runs; storage that fails for a moment (503, a server that begins anew) is awaited.

    Raises:
        Exception: what the task raised, the last time it was tried if storage failed, otherwise the first time.
    """
    for attempt in range(TRIES - 1):
        try:
            return function(*arguments)
        except (OSError, BitfoldError) as error:
            if not _passes(error):
                raise
        sleep(WAIT * 2**attempt)
    return function(*arguments)


def _passes(error: BaseException) -> bool:
    """Whether it comes from storage, and may be over in a moment: a full disk does not get empty, nor a name right."""
    while isinstance(error, BitfoldError) and error.__cause__ is not None:
        error = error.__cause__
    return isinstance(error, OSError) and error.errno not in _LASTS


def died(task: Task, tries: int, cause: str) -> BitfoldError:
    """The error for a task that will not be tried again."""
    hint = "what is finished is kept, and the same command goes on with it; fewer workers leave each more memory"
    return ResourceError(f"died {tries} times, the last time because {cause}", where=task.name, hint=hint)
