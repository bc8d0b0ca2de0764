"""Several processes at one distillation or finetuning: they learn what one learns, and go on after a kill."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import bitfold
import forks
import tiny_lm
from bitfold.errors import CheckpointError, UsageError
from bitfold.training import masters
from bitfold.workspace import shared

SHORT = ["--seqlen", "48", "--batch", "4", "--steps", "12"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with its tokenizer and a text."""
    folder = tiny_lm.folder(tmp_path_factory.mktemp("team") / "source", tiny_lm.model())
    (folder / "text.txt").write_text(tiny_lm.TEXT, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def quantized(source: Path) -> Path:
    """In two bits, rounded."""
    out = source.with_name("quantized")
    bitfold.quantize(source, out, format="trellis-2", transform="hadamard")
    return out


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def torchrun(processes: int, *args: str) -> subprocess.CompletedProcess[str]:
    """As users start them."""
    places = ["--nproc-per-node", str(processes), "--master-addr", "127.0.0.1", "--master-port", free_port()]
    command = [sys.executable, "-m", "torch.distributed.run", *places, "-m", "bitfold", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def begun(processes: int, *args: str) -> list[forks.Interpreter]:
    """The same without `torchrun`: the variables that it sets, as far as PyTorch reads them; the leader first."""
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(processes)}
    ranks = [{**places, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [forks.Interpreter("-m", "bitfold", *args, env={**os.environ, **rank}) for rank in ranks]


def together(processes: int, *args: str) -> tuple[int, str, str]:
    """Exit code, output and errors of the leader; whether the others ended well too."""
    running = begun(processes, *args)
    (out, err), *others = [one.communicate(300) for one in running]
    codes = [one.returncode or 0 for one in running]
    return max(codes), out, err + "".join(said for _, said in others)


def distilling(quantized: Path, source: Path, out: Path) -> list[str]:
    text = str(source / "text.txt")
    return ["distill", str(quantized), "-t", str(source), "-o", str(out), "--text", text, "--json", *SHORT]


def numbers(folder: Path) -> dict[str, torch.Tensor]:
    found = {name: w for file in folder.glob("*.safetensors") for name, w in load_file(file).items()}
    return {name: w.float() for name, w in found.items() if w.is_floating_point()}


def test_two_processes_learn_what_one_learns(tmp_path: Path, quantized: Path, source: Path) -> None:
    """The same windows make the same steps, but for the order of sums: scales agree far closer than they moved."""
    found = {}
    for processes in (1, 2):
        code, out, err = together(processes, *distilling(quantized, source, tmp_path / str(processes)))
        assert code == 0, err[-2000:]
        found[processes] = json.loads(out)
    before, one, two = (numbers(folder) for folder in (quantized, tmp_path / "1", tmp_path / "2"))
    moved = sum(float((one[name] - before[name]).square().sum()) for name in one)
    apart = sum(float((one[name] - two[name]).square().sum()) for name in one)
    assert apart < 0.01 * moved
    assert found[2]["kl_before"] == pytest.approx(found[1]["kl_before"], rel=1e-5)
    assert found[2]["kl_after"] == pytest.approx(found[1]["kl_after"], rel=0.02)
    assert found[2]["kl_after"] < 0.9 * found[2]["kl_before"]


def test_gradients_are_there_for_all() -> None:
    """A parameter without a gradient in one process counts as zero there."""
    weight, other = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    found = masters.Masters([masters.Group({"weight": weight, "other": other}, 0.1)])
    weight.grad = torch.full((3,), 2.0)
    assert [g.tolist() for g in found.gradients()] == [[2.0, 2.0, 2.0], [0.0, 0.0]]


def test_after_a_kill_all_go_on_to_the_same_bytes(tmp_path: Path, quantized: Path, source: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert together(2, *distilling(quantized, source, whole))[0] == 0
    running = begun(2, *distilling(quantized, source, cut))
    journal = tmp_path / ".cut.partial" / "journal.jsonl"
    end = time.monotonic() + 240
    while time.monotonic() < end and not (journal.is_file() and b'"step"' in journal.read_bytes()):
        time.sleep(0.02)
    for one in running:
        one.kill()
    for one in running:
        one.wait()
    assert not cut.exists()
    code, _, err = together(2, *distilling(quantized, source, cut))
    assert code == 0, err[-2000:]
    assert "going on after step" in err
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_more_processes_than_windows_are_refused(tmp_path: Path, quantized: Path, source: Path) -> None:
    args = distilling(quantized, source, tmp_path / "out")
    args[args.index("--batch") + 1] = "1"
    code, _, err = together(2, *args)
    assert code != 0
    assert "2 processes cannot share the 1 windows of a step" in err
    assert not (tmp_path / "out").exists()


def test_adapters_are_trained_together(tmp_path: Path, quantized: Path, source: Path) -> None:
    pytest.importorskip("peft")
    args = ["finetune", str(quantized), "-d", str(source / "text.txt"), "-o", str(tmp_path / "adapter"), "--json"]
    done = torchrun(2, *args, "--rank", "4", "--rate", "0.01", *SHORT)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)  # the others say nothing
    assert found["loss_after"] < found["loss_before"]
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


class Led:
    """Of two processes, one, and what the leader says."""

    size = 2

    def __init__(self, rank: int, says: Any = None) -> None:
        self.rank, self.said = rank, [says]

    def told(self, value: Any) -> Any:
        if self.rank == 0:
            self.said.append(value)
        return self.said[-1]


def test_the_output_is_tried_by_the_leader_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that tried it at once found each other's attempts there, and one of them said that it exists already."""
    out, tried = tmp_path / "out", list[object]()
    real = shared.open_output
    monkeypatch.setattr(shared, "open_output", lambda *given: tried.append(given) or real(*given))
    leader: Any = Led(0)
    assert shared.shared_output(out, tmp_path / "source", leader) == out
    assert leader.said[-1] is True
    follower: Any = Led(1, says=True)
    assert shared.shared_output(out, tmp_path / "source", follower) == out
    assert len(tried) == 1
    (out / "other").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="exists already"):
        shared.shared_output(out, tmp_path / "source", leader)
    with pytest.raises(UsageError, match="the first process has said why"):
        shared.shared_output(out, tmp_path / "source", Led(1, says=leader.said[-1]))  # type: ignore[arg-type]
