"""`bitfold serve`: from the command to an answer, and to its end."""

from __future__ import annotations

import builtins
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import bitfold as package
from cli_runs import Bitfold, keys_are_documented


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_from_the_command_to_its_end(model: Path, number: signal.Signals) -> None:
    """What is being written when the signal comes is written to its end; then the program ends, content."""
    pytest.importorskip("fastapi", reason="fastapi is not installed")
    pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    environment = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[1])}
    command = [sys.executable, "-m", "bitfold", "serve", str(model), "--port", "0", "--context", "100", "--json"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(command, **pipes) as running:
        assert running.stderr is not None
        assert running.stdout is not None
        said = ""
        while not (found := re.search(r"http://\S+", said)):
            line = running.stderr.readline()
            assert line, said
            said += line
        ready = json.loads("".join(iter(running.stdout.readline, "}\n")) + "}")  # before anyone asks
        keys_are_documented("serve", ready)
        assert ready["url"] == found[0]
        assert re.search(r"weights [\d.]+ kB, keys and values [\d.]+ kB for 4 texts of 100 tokens", said)
        assert re.search(r"side by side, [\d.]+ MB to work in", said)
        body = {"model": model.name, "prompt": "a", "max_tokens": 90, "temperature": 0, "stream": True}
        request = urllib.request.Request(
            f"{found[0]}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            first = answer.readline()
            running.send_signal(number)
            rest = answer.read()
        assert first.startswith(b"data: ")
        assert rest.endswith(b"data: [DONE]\n\n")
        assert running.wait(60) == 0
        assert "Traceback" not in running.stderr.read()


def test_a_place_that_is_taken(bitfold: Bitfold, model: Path) -> None:
    pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        start = time.monotonic()
        result = bitfold("serve", model, "--port", taken.getsockname()[1])
    assert result.code == 2
    assert "cannot listen" in result.err
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "option",
    [
        ("--context", 1),
        ("--context", 100000),
        ("--sequences", 0),
        ("--queue", -1),
        ("--port", 70000),
        ("--api-key", ""),
    ],
    ids=str,
)
def test_numbers_that_make_no_sense(bitfold: Bitfold, model: Path, option: tuple[object, ...]) -> None:
    pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    result = bitfold("serve", model, *(("--port", 0) if option[0] != "--port" else ()), *option)
    assert result.code == 2
    assert option[0] in result.err


def test_without_the_extra(bitfold: Bitfold, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] in ("fastapi", "uvicorn"):
            raise ImportError(name, name=name.split(".")[0])
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("bitfold.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    result = bitfold("serve", model)
    assert result.code == 2
    assert "pip install 'bitfold[serve]'" in result.err
