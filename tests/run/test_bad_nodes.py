"""Machines that are not as they should be: a full disk, a clock that is off. One clear error, or the same bytes."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

import bitfold
import forks
import tiny_lm
from bitfold.calibration import shared_walk
from bitfold.calibration.listening import Errand, Heard, listen
from bitfold.checkpoints import shards
from bitfold.checkpoints.staging import partial_of
from bitfold.errors import CheckpointError
from bitfold.executors.ray_cluster import _call
from bitfold.run import crew
from bitfold.run.parts import make_part
from executor_runs import content

GPTQ: dict[str, Any] = {"bits": 4, "method": "gptq"}
RTN: dict[str, Any] = {"bits": 4, "method": "rtn"}
TWO: dict[str, Any] = {"executor": "processes", "workers": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_lm.folder(tmp_path_factory.mktemp("source"), tiny_lm.model())
    (folder / "text.txt").write_text(tiny_lm.TEXT)
    return folder


def text_of(source: Path) -> bitfold.Calibration:
    return bitfold.Calibration(str(source / "text.txt"), nsamples=10, seqlen=32)


def _fill_the_disk() -> None:
    """Of this process, whatever it writes."""

    def plain(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def serialized(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    shards._write_all, shards.save_file = plain, serialized  # type: ignore[assignment]


def part_on_a_full_disk(*given: Any) -> str:
    _fill_the_disk()
    return make_part(*given)


def listen_on_a_full_disk(errand: Errand) -> Heard:
    _fill_the_disk()
    return listen(errand)


@pytest.mark.parametrize(
    ("options", "patched"),
    [(RTN, (crew, "make_part", part_on_a_full_disk)), (GPTQ, (shared_walk, "listen", listen_on_a_full_disk))],
)
def test_a_full_disk_of_a_worker(
    source: Path,
    tmp_path: Path,
    options: dict[str, Any],
    patched: tuple[Any, str, Callable[..., Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It says so, names the file, and is not tried again; with room the same command goes on to the same bytes."""
    forks.for_workers(monkeypatch)
    given = {**options, "calibration": text_of(source)} if options is GPTQ else options
    with monkeypatch.context() as patch:
        patch.setattr(*patched)
        with pytest.raises(CheckpointError, match="the disk is full") as caught:
            bitfold.quantize(source, tmp_path / "out", **given, **TWO)
    where = Path(str(caught.value.where))
    assert where.is_relative_to(partial_of(tmp_path / "out"))
    assert where.name.startswith("heard-") == (options is GPTQ)  # not of what a run does instead of calibration
    assert caught.value.hint == "make room, and run the same command again"
    assert not (tmp_path / "out").exists()
    bitfold.quantize(source, tmp_path / "out", **given, **TWO)
    bitfold.quantize(source, tmp_path / "plain", **given)
    assert content(tmp_path / "out") == content(tmp_path / "plain")


def _full(where: str) -> None:
    raise shards.written_error(OSError(errno.ENOSPC, ""), Path(where), "cannot be written")


def test_errors_of_other_machines_name_them() -> None:
    """What runs in a Ray task is run as it is there."""
    with pytest.raises(CheckpointError, match=f"on {os.uname().nodename}: cannot be written: the disk is full"):
        _call(_full, ("there",), 1)


def part_with_a_clock_that_is_off(*given: Any) -> str:
    time.time = lambda: 1e9  # type: ignore[assignment]  # 2001
    return make_part(*given)


def test_a_clock_that_is_off(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is finished is known by its hash: neither the time of a worker nor that of a file decides anything."""
    forks.for_workers(monkeypatch)
    out, seen, real = tmp_path / "out", list[object](), crew.read_part

    def second(*given: Any) -> Any:
        seen.append(given)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(crew, "make_part", part_with_a_clock_that_is_off)
    with monkeypatch.context() as patch:
        patch.setattr(crew, "read_part", second)
        with pytest.raises(KeyboardInterrupt):
            bitfold.quantize(source, out, **RTN, **TWO)
    left = {path.name for path in (partial_of(out) / "parts").iterdir() if not path.name.startswith(".")}
    assert left
    for number, path in enumerate(sorted(partial_of(out).rglob("*"))):
        when = (1_000_000_000, 4_000_000_000)[number % 2]  # 2001, 2096
        os.utime(path, (when, when))
    with monkeypatch.context() as patch:
        taken = list[str]()
        patch.setattr(crew, "read_part", lambda path, plan: (taken.append(path.name), real(path, plan))[1])
        patch.setattr(time, "time", lambda: 4e9)
        bitfold.quantize(source, out, **RTN, **TWO)
    assert left <= set(taken)
    bitfold.quantize(source, tmp_path / "plain", **RTN)
    assert content(out) == content(tmp_path / "plain")
