"""Runs that are cut short: the same call goes on with them, and the bytes are those of a run that never stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitfold
import tiny_lm
from bitfold import Calibration
from bitfold.checkpoints.staging import partial_of
from bitfold.errors import BitfoldError, CheckpointError
from bitfold.workspace.journal import NAME, Journal
from numerics import check_same_codes


def content(folder: Path) -> dict[str, str]:
    """Every file of a folder by its hash; the record says how long the run took."""
    files = (f for f in sorted(folder.iterdir()) if f.name != "bitfold_report.json")
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model."""
    return tiny_lm.folder(tmp_path_factory.mktemp("resume") / "source", tiny_lm.model())


OPTIONS: dict[str, Any] = {"format": "int4-asym-g32", "max_shard_bytes": 100_000}


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run that nothing disturbs leaves: several shards."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    bitfold.quantize(source, out, **OPTIONS)
    assert len(list(out.glob("*.safetensors"))) > 1
    return out


class Stopped(Exception):
    """Raised in the middle."""


def stop_after(count: int) -> Any:
    """An on_tensor that ends the run."""
    seen: list[str] = []

    def on_tensor(report: Any) -> None:
        seen.append(report.tensor)
        if len(seen) == count:
            raise Stopped

    return on_tensor


def begun(source: Path, out: Path, tensors: int) -> None:
    """A run that stops after so many tensors."""
    with pytest.raises(Stopped), pytest.warns(UserWarning, match="the same command goes on"):
        bitfold.quantize(source, out, **OPTIONS, on_tensor=stop_after(tensors))
    assert not out.exists()


@pytest.mark.parametrize("tensors", [1, 9, 20])
def test_goes_on_where_it_stopped(source: Path, undisturbed: Path, tmp_path: Path, tensors: int) -> None:
    """Only what is missing is done, and no byte is different; nothing is left beside the folder."""
    out = tmp_path / "out"
    begun(source, out, tensors)
    again: list[str] = []
    report = bitfold.quantize(source, out, **OPTIONS, on_tensor=lambda t: again.append(t.tensor))
    assert len(again) == len(report.tensors) - tensors
    assert content(out) == content(undisturbed)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("damage", ["journal cut", "journal flipped", "shard flipped", "shard short", "shard gone"])
def test_what_a_power_failure_may_leave(source: Path, undisturbed: Path, tmp_path: Path, damage: str) -> None:
    """Lines without data, data without lines, pages of zeros: what cannot be trusted is done again."""
    out = tmp_path / "out"
    begun(source, out, 12)
    work = partial_of(out)
    file = work / NAME if damage.startswith("journal") else min((work / "result").glob("*.safetensors"))
    data = file.read_bytes()
    if damage.endswith("gone"):
        file.unlink()
    elif damage.endswith("flipped"):
        file.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 255]) + data[len(data) // 2 + 1 :])
    else:
        file.write_bytes(data[: len(data) // 2 + 7])
    bitfold.quantize(source, out, **OPTIONS)
    assert content(out) == content(undisturbed)


def test_stopped_between_the_rename_and_the_end(source: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The last moment there is: the folder has its name, the journal is still there."""
    out = tmp_path / "out"
    begun(source, out, 12)
    saved = tmp_path / "saved"
    shutil.copytree(partial_of(out), saved)
    bitfold.quantize(source, out, **OPTIONS)
    shutil.rmtree(saved / "result")
    saved.rename(partial_of(out))
    bitfold.quantize(source, out, **OPTIONS)
    assert content(out) == content(undisturbed)
    assert not partial_of(out).exists()


CHANGES = {
    "source": "weights",
    "recipe": {"format": "int3-asym-g32"},
    "seed": {"seed": 1},
    "shard size": {"max_shard_bytes": 90_000},
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_run_is_refused(source: Path, tmp_path: Path, what: str) -> None:
    """Nothing is mixed and nothing is thrown away unasked; the message says what is different."""
    mine = tmp_path / "source"
    shutil.copytree(source, mine)
    out = tmp_path / "out"
    begun(mine, out, 5)
    options = dict(OPTIONS)
    if what == "source":
        weights = load_file(mine / "model.safetensors")
        weights["model.norm.weight"] += 1
        save_file(weights, mine / "model.safetensors", metadata={"format": "pt"})
    else:
        options |= CHANGES[what]  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=rf"different are .*{what}.*--restart"):
        bitfold.quantize(mine, out, **options)
    assert partial_of(out).exists()
    bitfold.quantize(mine, out, **options, restart=True)
    bitfold.quantize(mine, tmp_path / "fresh", **options)
    assert content(out) == content(tmp_path / "fresh")


def test_one_process_at_a_time(source: Path, tmp_path: Path) -> None:
    """A second one is told so."""
    journal = Journal(tmp_path / "work", {"a": 1})
    with pytest.raises(CheckpointError, match="another process"):
        Journal(tmp_path / "work", {"a": 1})
    journal.close()
    Journal(tmp_path / "work", {"a": 1}).close()


def test_journal_survives_any_cut(tmp_path: Path) -> None:
    """At every byte: the whole lines before it are read, and new ones can follow."""
    journal = Journal(tmp_path / "work", {"a": 1})
    for i in range(3):
        journal.append({"kind": "tensor", "tensor": f"t{i}"})
    journal.close()
    data = (tmp_path / "work" / NAME).read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for cut in range(len(data) + 1):
        (tmp_path / "work" / NAME).write_bytes(data[:cut])
        journal = Journal(tmp_path / "work", {"a": 1})
        whole = sum(end <= cut for end in ends)
        assert [r["tensor"] for r in journal.of_kind("tensor")] == [f"t{i}" for i in range(max(0, whole - 1))]
        journal.append({"kind": "tensor", "tensor": "new"})
        journal.close()
        journal = Journal(tmp_path / "work", {"a": 1})
        assert journal.records[-1]["tensor"] == "new"
        journal.close()


def test_read_errors_keep_finished_work(
    source: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails once costs nothing but the second call."""
    from bitfold.checkpoints.safetensors import SafetensorsSource

    read, count = SafetensorsSource.read, [0]

    def failing(self: SafetensorsSource, name: str) -> torch.Tensor:
        count[0] += 1
        if count[0] == 8:
            raise CheckpointError("cannot read: Input/output error", where=name)
        return read(self, name)

    monkeypatch.setattr(SafetensorsSource, "read", failing)
    with pytest.raises(CheckpointError, match="Input/output"), pytest.warns(UserWarning, match="goes on"):
        bitfold.quantize(source, tmp_path / "out", **OPTIONS)
    lines = (partial_of(tmp_path / "out") / NAME).read_text().splitlines()
    assert sum(json.loads(line[9:])["kind"] == "tensor" for line in lines) == 7
    bitfold.quantize(source, tmp_path / "out", **OPTIONS)
    assert content(tmp_path / "out") == content(undisturbed)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_full_disk(source: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Writes that fail at some point (here: files may not grow) are one clear error; with room again it goes on."""
    import resource
    import signal

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, old[1]))
        with pytest.raises(BitfoldError, match="cannot be written") as caught:
            bitfold.quantize(source, tmp_path / "out", **OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    # What is kept is said by those who keep it: `convert` begins anew.
    assert caught.value.hint == "make room, and run the same command again"
    bitfold.quantize(source, tmp_path / "out", **OPTIONS)
    assert content(tmp_path / "out") == content(undisturbed)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root may mount a small file system")
def test_full_file_system(source: Path, undisturbed: Path, tmp_path: Path) -> None:
    """A file system that is really full: planned sizes are sparse, so the write fails, not the planning."""
    import ctypes

    libc, small = ctypes.CDLL(None, use_errno=True), tmp_path / "small"
    small.mkdir()
    if libc.mount(b"tmpfs", str(small).encode(), b"tmpfs", 0, b"size=1m") != 0:
        pytest.skip("mounting is not allowed here")
    try:
        (small / "ballast").write_bytes(b"x" * 850_000)
        with pytest.raises(BitfoldError, match=r"disk|room") as caught:
            bitfold.quantize(source, small / "out", **OPTIONS)
        assert caught.value.exit_code in (3, 9)
        (small / "ballast").unlink()
        bitfold.quantize(source, small / "out", **OPTIONS)
        assert content(small / "out") == content(undisturbed)
    finally:
        libc.umount2(str(small).encode(), 2)


def killed(trials: int) -> dict[str, Any]:
    """The benchmark that kills runs, in a process of its own."""
    script = Path(__file__).parents[2] / "benchmarks" / "kill_and_resume.py"
    if not script.is_file():
        pytest.skip("not a checkout: the benchmark is not here")
    command = [sys.executable, str(script), "--trials", str(trials)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_killed_at_random_moments() -> None:
    """SIGKILL in the middle of a calibrated run; the run that goes on gives the same bytes."""
    found = killed(6)
    assert found["identical"] == 6
    assert found["killed"] >= 4


@pytest.mark.slow
@pytest.mark.skipif("BITFOLD_SLOW" not in os.environ, reason="minutes; set BITFOLD_SLOW=1")
def test_killed_at_fifty_moments() -> None:
    """The same, 50 times."""
    assert killed(50)["identical"] == 50


CALIBRATED: dict[str, Any] = {"format": "int4-g32", "method": "ldlq"}


def calibrated_once(source: Path, out: Path, drift: float = 0.5, **more: Any) -> Any:
    """A calibrated run of the small model."""
    text = Calibration(str(source / "calibration.txt"), nsamples=4, seqlen=32, fisher=False, drift=drift)
    return bitfold.quantize(source, out, **CALIBRATED, calibration=text, **more)


@pytest.fixture(scope="module")
def with_text(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model and a text beside it."""
    folder = tmp_path_factory.mktemp("text") / "source"
    shutil.copytree(source, folder)
    (folder / "calibration.txt").write_text(tiny_lm.TEXT, encoding="utf-8")
    return folder


@pytest.mark.parametrize("drift", [0.5, 0.0])
def test_finished_blocks_are_not_done_again(with_text: Path, tmp_path: Path, drift: float) -> None:
    """Stopped in the second block: only that one is repeated, from the activations that were kept.

    Without a correction for drift, nobody asks for those of the original model.
    """
    calibrated_once(with_text, tmp_path / "whole", drift)
    with pytest.raises(Stopped), pytest.warns(UserWarning, match="goes on"):
        calibrated_once(with_text, tmp_path / "out", drift, on_tensor=stop_after(10))
    kept = {file.name for file in (partial_of(tmp_path / "out") / "state").glob("*/*-1.bin")}
    assert kept == ({"original-1.bin", "quantized-1.bin"} if drift else {"quantized-1.bin"})
    assert not list((partial_of(tmp_path / "out") / "state").glob("*/*-0.bin"))
    again: list[str] = []
    calibrated_once(with_text, tmp_path / "out", drift, on_tensor=lambda t: again.append(t.tensor))
    assert not any("layers.0.mlp" in name for name in again)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["activations", "tensor", "inputs"])
def test_what_calibration_left_is_checked(with_text: Path, tmp_path: Path, damage: str) -> None:
    """Activations, text or finished tensors that are not what the journal says: from the beginning, and right."""
    calibrated_once(with_text, tmp_path / "whole")
    with pytest.raises(Stopped), pytest.warns(UserWarning, match="goes on"):
        calibrated_once(with_text, tmp_path / "out", on_tensor=stop_after(10))
    work = partial_of(tmp_path / "out")
    name = {"activations": "state/model.layers/quantized-1.bin", "tensor": "result/model.safetensors"}.get(damage)
    file = work / (name or "state/inputs.safetensors")
    data = file.read_bytes()
    at = len(data) - 5 if damage != "tensor" else 9000 + int.from_bytes(data[:8], "little")
    file.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
    calibrated_once(with_text, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_the_number_of_threads_changes_next_to_nothing(with_text: Path, tmp_path: Path) -> None:
    """With calibration PyTorch runs the model, and its sums depend on threads: ties may fall otherwise, no more."""
    before, reports = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            reports.append(calibrated_once(with_text, tmp_path / str(threads)))
    finally:
        torch.set_num_threads(before)
    first, *others = (load_file(tmp_path / str(threads) / "model.safetensors") for threads in (1, 2, 3))
    for other in others:
        assert other.keys() == first.keys()
        for name, tensor in first.items():
            check_same_codes(other[name], tensor, share=0.95)
    errors = [[t.output_error for t in report.quantized] for report in reports]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)
    assert errors[0] == pytest.approx(errors[2], rel=0.02)
