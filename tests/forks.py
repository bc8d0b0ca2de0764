"""Interpreters that begin where imports have ended: `python ...` in a process of its own, without the seconds before.

One process (multiprocessing's fork server) imports PyTorch, transformers and the program once, computes nothing, starts
no thread, and is forked for each interpreter. For tests that kill a run or watch it from outside. Those of the start
itself, of memory, or of variables that a library reads while it is imported start `sys.executable` instead.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest

_IMPORTED = [
    "torch.distributed", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
    "safetensors.torch", "bitfold.cli", "bitfold.run.driver",
]  # fmt: skip


def context() -> multiprocessing.context.BaseContext:
    """What starts such processes; a system without fork starts them from nothing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(_IMPORTED)
    return found


def for_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the workers of executors like this too, until the test ends."""
    found = context()
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: found)


class Interpreter:
    """`python *words`, watched as a `subprocess.Popen` is.

    Args:
        words: `-m MODULE`, `-c PROGRAM` or a script, then its own.
        env: its environment, otherwise this one's.
    """

    def __init__(self, *words: object, env: Mapping[str, str] | None = None) -> None:
        self._said = tempfile.TemporaryDirectory()
        environment = dict(os.environ if env is None else env)
        given = ([str(word) for word in words], environment, str(Path.cwd()), self._said.name)
        self._process = context().Process(target=_interpret, args=given)  # type: ignore[attr-defined]
        self._process.start()
        self.pid: int = self._process.pid
        weakref.finalize(self, _end, self._process)  # of a test that failed

    @property
    def returncode(self) -> int | None:
        """As of a `Popen`: minus the signal that killed it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("python", timeout or 0)
        return int(self._process.exitcode)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it printed, and what it said on the other stream."""
        self.wait(timeout)
        out, err = ((Path(self._said.name) / name) for name in ("out", "err"))
        return tuple(file.read_text(encoding="utf-8") if file.exists() else "" for file in (out, err))  # type: ignore[return-value]


def run(*words: object, env: Mapping[str, str] | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` does, both streams captured."""
    started = Interpreter(*words, env=env)
    out, err = started.communicate(timeout)
    return subprocess.CompletedProcess([str(word) for word in words], started.returncode or 0, out, err)


def _end(process: multiprocessing.Process) -> None:
    if process.is_alive():
        process.kill()


def _interpret(words: list[str], environment: dict[str, str], place: str, said: str) -> None:
    """In the new process: what an interpreter does with its command line."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(place)
    for stream, name in ((1, "out"), (2, "err")):
        file = os.open(Path(said) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    sys.stdout, sys.stderr = (open(fd, "w", encoding="utf-8", closefd=False) for fd in (1, 2))  # noqa: SIM115
    kind = words.pop(0) if words[0] in ("-m", "-c") else "script"
    what, sys.argv = words[0], words
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(what, {"__name__": "__main__"})
    else:
        runpy.run_path(what, run_name="__main__")
