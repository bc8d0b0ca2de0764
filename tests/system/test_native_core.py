"""The native core as a module: which instruction set runs, and what happens without it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bitfold.system import native


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


def test_scalar_is_always_there():
    core = native.core()
    if core is None:
        pytest.skip("no native core in this installation")
    assert core.isas()[0] == "scalar"
    assert core.isa() in core.isas()
    assert not core.set_isa("z80")


def test_an_instruction_set_can_be_forced():
    if native.core() is None:
        pytest.skip("no native core in this installation")
    done = run("from bitfold.system import native; print(native.core().isa())", BITFOLD_ISA="scalar")
    assert done.stdout.strip() == "scalar", done.stderr


def test_an_unavailable_instruction_set_is_an_error():
    if native.core() is None:
        pytest.skip("no native core in this installation")
    done = run("from bitfold.system import native; native.core()", BITFOLD_ISA="z80")
    assert done.returncode != 0
    assert "UsageError: BITFOLD_ISA: the instruction set 'z80' is not available here" in done.stderr


def test_without_the_core_it_says_so_once_and_goes_on():
    code = """
import sys, torch
sys.modules["bitfold._native"] = None
from bitfold.formats.packing import pack
print(pack(torch.tensor([1, 0, 3, 2]), 2).tolist(), pack(torch.tensor([1]), 2).tolist())
"""
    done = run(code)
    assert done.stdout.strip() == "[177] [1]", done.stderr
    assert done.stderr.count("without its native core") == 1


def test_it_can_be_disabled_silently(monkeypatch):
    monkeypatch.setenv("BITFOLD_NATIVE", "0")
    assert native.core() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_threads_survive_a_fork():
    code = """
import os, torch
from bitfold.formats.packing import pack, unpack
codes = torch.randint(0, 8, (1 << 21,), dtype=torch.uint8)
torch.set_num_threads(2)
def round_trip():
    return torch.equal(unpack(pack(codes, 3), 3, len(codes)), codes)
assert round_trip()
pid = os.fork()
if pid == 0:
    from bitfold.system import native
    core, out = native.core(), torch.empty(3 << 18, dtype=torch.uint8)
    core.pack(codes.data_ptr(), 1, len(codes), 3, out.data_ptr(), 2)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert round_trip()
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
