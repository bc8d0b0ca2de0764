"""Laws of executors: every task once, the same answers, those that die tried again, a bounded number of times."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from bitfold.errors import BitfoldError, CheckpointError, ResourceError, UsageError
from bitfold.executors.opening import check_executor, open_executor
from bitfold.executors.processes import cores
from bitfold.executors.protocol import TRIES, WAIT, Needs, Task, carried_out, run_all


def square(x: int) -> int:
    return x * x


def die_until(folder: str, times: int, signal_number: int) -> str:
    """Ends its process as often as that, then answers."""
    mark = Path(folder) / str(len(list(Path(folder).iterdir())))
    if int(mark.name) >= times:
        return "done"
    mark.touch()
    os.kill(os.getpid(), signal_number)
    time.sleep(10)
    return "killed too late"


def fail_until(folder: str, times: int) -> str:
    """Fails as storage does."""
    mark = Path(folder) / str(len(list(Path(folder).iterdir())))
    if int(mark.name) >= times:
        return "done"
    mark.touch()
    raise OSError(f"503, mark {mark.name}")


def complain() -> None:
    raise CheckpointError("is broken", where="that file", hint="mend it")


def threads() -> tuple[int, int]:
    import torch

    return os.getpid(), torch.get_num_threads()


def task(function: object, *arguments: object, name: str = "a task") -> Task:
    return Task(name, function, arguments, Needs())  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "workers"), [("local", None), ("processes", 1), ("processes", 3)])
def test_every_task_once(text: str, workers: int | None) -> None:
    with open_executor(text, workers) as executor:
        found = [answer for _, answer in run_all(executor, (task(square, x, name=str(x)) for x in range(20)))]
        assert sorted(found) == [x * x for x in range(20)]
        assert list(run_all(executor, [])) == []


def test_workers_share_the_cores() -> None:
    with open_executor("processes", 2) as executor:
        assert 2 * executor.threads <= max(2, cores())
        (_, (pid, found)), *_ = run_all(executor, [task(threads)])
        assert pid != os.getpid()
        assert found == executor.threads


def test_a_worker_that_is_killed_costs_its_task_alone(tmp_path: Path) -> None:
    with open_executor("processes", 1) as executor:
        assert [answer for _, answer in run_all(executor, [task(die_until, str(tmp_path), 1, signal.SIGKILL)])] == [
            "done"
        ]
        assert len(list(tmp_path.iterdir())) == 1


def test_a_task_that_always_dies_is_told_of(tmp_path: Path) -> None:
    with open_executor("processes", 2) as executor:
        tasks = [task(die_until, str(tmp_path), 99, signal.SIGKILL, name="quantizing that layer")]
        with pytest.raises(ResourceError, match=rf"that layer: died {TRIES} times.*killed by SIGKILL"):
            list(run_all(executor, tasks))
        assert len(list(tmp_path.iterdir())) == TRIES
        assert [answer for _, answer in run_all(executor, [task(square, 3)])] == [9]  # it can go on being used


def test_storage_may_fail_for_a_moment(tmp_path: Path) -> None:
    with open_executor("processes", 1) as executor:
        assert [answer for _, answer in run_all(executor, [task(fail_until, str(tmp_path), TRIES - 1)])] == ["done"]
    with open_executor("processes", 1) as executor, pytest.raises(ResourceError, match="503, mark"):
        list(run_all(executor, [task(fail_until, str(tmp_path), 99)]))


def test_waits_grow() -> None:
    """Of storage that fails, whether the error is its own or says what could not be read; not of a full disk."""
    for error in (OSError("503"), _caused(OSError(errno.EIO, "")), _caused(ConnectionResetError())):
        waits, times = list[float](), list[int]()

        def failing(error: Exception = error, times: list[int] = times) -> str:
            times.append(1)
            if len(times) < TRIES:
                raise error
            return "done"

        assert carried_out(failing, (), waits.append) == "done"
        assert waits == [WAIT, 2 * WAIT]
        with pytest.raises(type(error)):
            carried_out(lambda error=error: failing(error, []), (), waits.append)
    waits = []
    for error in (OSError(errno.ENOSPC, ""), _caused(OSError(errno.ENOSPC, "")), CheckpointError("is broken")):
        with pytest.raises(type(error)):
            carried_out(failing, (error, []), waits.append)
    assert waits == []


def _caused(error: OSError) -> CheckpointError:
    found = CheckpointError("cannot be read")
    found.__cause__ = error
    return found


def test_errors_for_people_come_as_they_were_raised() -> None:
    with open_executor("processes", 1) as executor:
        with pytest.raises(CheckpointError) as found:
            list(run_all(executor, [task(complain)]))
        assert (found.value.where, found.value.hint) == ("that file", "mend it")
        with pytest.raises(RuntimeError, match="unsupported operand"):
            list(run_all(executor, [task(square, None)]))


def test_leaving_ends_what_runs() -> None:
    began = time.monotonic()
    with open_executor("processes", 1) as executor:
        executor.submit(task(time.sleep, 60))
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("text", "workers"), [("threads", None), ("local", 2), ("processes", 0), ("processes:2", None), ("ray:", None)]
)
def test_what_cannot_be_meant(text: str, workers: int | None) -> None:
    with pytest.raises(UsageError) as found:
        check_executor(text, workers)
    assert isinstance(found.value, BitfoldError)
    assert found.value.where in ("--executor", "--workers")
