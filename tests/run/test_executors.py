"""Runs whose tensors other processes make: the same bytes, whatever happens to the processes."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import bitfold
import forks
from bitfold.checkpoints.staging import partial_of
from bitfold.errors import CheckpointError, ResourceError, UsageError
from bitfold.system import memory
from executor_runs import children, content, model, started, wait_for, written

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"bits": 3, "method": "rtn"},
    "hqq": {"bits": 4, "method": "hqq"},
    "nf4": {"format": "nf4-dq"},
    "trellis": {"format": "trellis-2", "method": "rtn", "transform": "hadamard"},
    "gguf": {"export": "gguf:Q4_0"},
    "gptq folder": {"export": "gptq", "bits": 4, "method": "rtn", "group_size": 32},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("source"))


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS.keys())
def test_same_bytes_for_any_number_of_workers(
    source: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, reports = [], []
    for workers in (0, 2, 1, 3) if options == METHODS["rtn"] else (0, 2):
        if found and (options != METHODS["rtn"] or workers != 2):  # one time they start as they do outside of tests
            forks.for_workers(monkeypatch)
        how: dict[str, Any] = {"executor": "processes", "workers": workers} if workers else {}
        out = tmp_path / str(len(found)) / "out"
        out.parent.mkdir()
        report = bitfold.quantize(source, out.with_suffix(".gguf") if "gguf" in str(options) else out, **options, **how)
        found.append(content(Path(str(report.output))))
        reports.append(report.tensors)
    assert all(one == found[0] for one in found)
    assert all(one == reports[0] for one in reports)


def test_what_cannot_be_meant(source: Path, tmp_path: Path) -> None:
    for how in ({"executor": "threads"}, {"executor": "processes", "workers": 0}, {"workers": 2}):
        with pytest.raises(UsageError):
            bitfold.quantize(source, tmp_path / "out", bits=4, method="rtn", **how)  # type: ignore[arg-type]
    ceiling = (memory.resident() or 0) + 450_000_000  # enough for this process, and less than two others take
    how = {"executor": "processes", "workers": 2, "max_memory": ceiling}
    with pytest.raises(ResourceError, match="2 workers"):
        bitfold.quantize(source, tmp_path / "out", bits=4, method="rtn", **how)  # type: ignore[arg-type]
    assert not partial_of(tmp_path / "out").exists()


TRELLIS = {"format": "trellis-4", "method": "rtn", "transform": "hadamard"}
FLAGS = [text for name, value in TRELLIS.items() for text in (f"--{name}", value)]
TWO = ("--executor", "processes", "--workers", "2")


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_killed_driver_and_a_killed_worker(source: Path, tmp_path: Path) -> None:
    """Nothing that was finished is done again, no process stays, the bytes are those of an undisturbed run."""
    out, quiet = tmp_path / "out", tmp_path / "quiet"
    driver = started(source, out, *FLAGS, *TWO)
    wait_for(lambda: len(written(out)) >= 2)
    workers = children(driver.pid)
    driver.kill()
    driver.wait()
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), 60)
    before = written(out)
    driver = started(source, out, *FLAGS, *TWO)
    wait_for(lambda: len(children(driver.pid)) == 2)
    os.kill(children(driver.pid)[0], signal.SIGKILL)
    said = driver.communicate(timeout=120)[1]
    assert driver.returncode == 0, said
    assert f"going on: {len(before)} of" in said
    bitfold.quantize(source, quiet, **TRELLIS)  # type: ignore[arg-type]
    assert content(out) == content(quiet)


def test_a_damaged_part_is_made_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a driver that ended between a worker's finished part and its own work."""
    from bitfold.run import crew

    forks.for_workers(monkeypatch)
    out, plain = tmp_path / "out", tmp_path / "plain"
    how = {"bits": 4, "method": "rtn", "executor": "processes", "workers": 1}

    def fail(*_: object) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(crew, "read_part", fail)
        with pytest.raises(KeyboardInterrupt):
            bitfold.quantize(source, out, **how)  # type: ignore[arg-type]
    assert not partial_of(out).exists()  # nothing was noted yet
    with monkeypatch.context() as patch:
        seen: list[int] = []
        real = crew.read_part

        def later(*given: Any) -> Any:
            seen.append(1)
            return fail() if len(seen) == 2 else real(*given)

        patch.setattr(crew, "read_part", later)
        with pytest.raises(KeyboardInterrupt):
            bitfold.quantize(source, out, **how)  # type: ignore[arg-type]
    left = [f for f in (partial_of(out) / "parts").iterdir() if not f.name.startswith(".")]
    file = next(left[0].glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    bitfold.quantize(source, out, **how)  # type: ignore[arg-type]
    bitfold.quantize(source, plain, bits=4, method="rtn")
    assert content(out) == content(plain)


def test_a_worker_of_another_version_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitfold.run import order

    real = order.software()
    monkeypatch.setattr(order, "software", lambda: {**real, "torch": "1.0"})
    with pytest.raises(CheckpointError, match=r"different are torch \(.* here, 1\.0 there\)"):
        bitfold.quantize(source, tmp_path / "out", bits=4, method="rtn", executor="processes", workers=1)
