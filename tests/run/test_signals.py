"""What SIGTERM leaves behind: words, an exit code, work that the same command goes on with."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import forks
import tiny_lm

# The program itself, which asks itself to end after so many tensors.
PROGRAM = """
import os, signal, sys
from bitfold.cli import main
from bitfold.run.writing import Writing
last, note, noted = int(sys.argv.pop(1)), Writing._note, []
def noting(self, *facts):
    noted.append(note(self, *facts))
    if len(noted) == last:
        os.kill(os.getpid(), signal.SIGTERM)
    return noted[-1]
Writing._note = noting
main()
"""


def bitfold(last: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run it, ended after `last` tensors; 0 = not at all."""
    return forks.run("-c", PROGRAM, last, *arguments)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends processes without asking them")
def test_sigterm_keeps_what_is_finished_and_says_where(tmp_path: Path) -> None:
    """As Ctrl-C does, with the exit code of SIGTERM; the same command goes on, to the same bytes."""
    source, text = tiny_lm.folder(tmp_path / "source", tiny_lm.model()), tmp_path / "text.txt"
    text.write_text(tiny_lm.TEXT, encoding="utf-8")
    more = ("--method", "gptq", "--nsamples", 2, "--seqlen", 32, "--calibration", text)
    ended = bitfold(9, "quantize", source, "--bits", 4, "--group-size", 32, *more, "-o", tmp_path / "out")
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
    assert f"what is finished is kept in {tmp_path / '.out.partial'}: the same command goes on" in ended.stderr
    assert ended.stderr.splitlines()[-1] == "terminated"
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()
    resumed = bitfold(0, "quantize", source, "--bits", 4, "--group-size", 32, *more, "-o", tmp_path / "out")
    assert resumed.returncode == 0, resumed.stderr
    assert "going on: 9 of" in resumed.stderr
    whole = bitfold(0, "quantize", source, "--bits", 4, "--group-size", 32, *more, "-o", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
