"""Calibrated runs whose text other processes run: the same bytes, whatever happens to the processes."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import bitfold
import forks
import tiny_lm
from bitfold.calibration import shared_walk
from bitfold.calibration.options import settings
from bitfold.errors import ResourceError
from executor_runs import children, content, started, wait_for, written

METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "method": "gptq"},
    "trellis": {"bits": 2, "method": "trellis"},  # drift, token weights, int8 activations measured
    "awq": {"bits": 4, "method": "awq"},
    "signround": {"bits": 4, "method": "signround"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_lm.folder(tmp_path_factory.mktemp("source"), tiny_lm.model())
    (folder / "text.txt").write_text(tiny_lm.TEXT)
    return folder


def text_of(source: Path) -> bitfold.Calibration:
    """Three groups of windows, the last one smaller."""
    return bitfold.Calibration(str(source / "text.txt"), nsamples=10, seqlen=32)


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS.keys())
def test_same_bytes_as_here(
    source: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    forks.for_workers(monkeypatch)
    given = {**options, "calibration": text_of(source)}
    here = bitfold.quantize(source, tmp_path / "here", **given)
    there = bitfold.quantize(source, tmp_path / "there", executor="processes", workers=2, **given)
    assert here.fallbacks == there.fallbacks == []
    assert here.tensors == there.tensors
    assert content(tmp_path / "here") == content(tmp_path / "there")


@pytest.mark.parametrize("name", ["gptq", "trellis"])
def test_rows_of_large_layers_are_coded_by_others(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces of rows, of which no process has all: bytes and errors are those of a run that has."""
    forks.for_workers(monkeypatch)
    config = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=640, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    source = tiny_lm.folder(tmp_path / "source", LlamaForCausalLM(config).eval())
    (source / "text.txt").write_text(tiny_lm.TEXT)
    given = {**METHODS[name], "calibration": text_of(source)}
    threads, shared = torch.get_num_threads(), list[str]()
    real = shared_walk.code_together

    def noted(coding: Any, *more: Any) -> Any:
        shared.extend(coding.names)
        return real(coding, *more)

    monkeypatch.setattr(shared_walk, "code_together", noted)
    try:
        torch.set_num_threads(1)
        here = bitfold.quantize(source, tmp_path / "here", **given)
        there = bitfold.quantize(source, tmp_path / "there", executor="processes", workers=2, **given)
    finally:
        torch.set_num_threads(threads)
    assert any("up_proj" in tensor for tensor in shared)
    assert here.fallbacks == there.fallbacks == []
    assert here.tensors == there.tensors
    assert content(tmp_path / "here") == content(tmp_path / "there")


def test_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are measured in the process that was called, among layers that are not."""
    forks.for_workers(monkeypatch)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=128,
    )  # fmt: skip
    source = tiny_lm.folder(tmp_path / "source", MixtralForCausalLM(config).eval())
    (source / "text.txt").write_text(tiny_lm.TEXT)
    given = {"bits": 4, "method": "gptq", "calibration": text_of(source)}
    bitfold.quantize(source, tmp_path / "here", **given)  # type: ignore[arg-type]
    bitfold.quantize(source, tmp_path / "there", executor="processes", workers=2, **given)  # type: ignore[arg-type]
    assert content(tmp_path / "here") == content(tmp_path / "there")


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_killed_driver_and_a_killed_worker(source: Path, tmp_path: Path) -> None:
    out, quiet = tmp_path / "out", tmp_path / "quiet"
    given = ["--bits", "4", "--method", "gptq", "--nsamples", "10", "--seqlen", "32"]
    given += ["--calibration", str(source / "text.txt"), "--executor", "processes", "--workers", "2"]
    driver = started(source, out, *given)
    wait_for(lambda: bool(children(driver.pid)) or driver.poll() is not None)
    os.kill(children(driver.pid)[0], signal.SIGKILL)
    wait_for(lambda: len(written(out)) >= 8)  # one block is behind it
    driver.kill()
    driver.communicate()
    driver = started(source, out, *given)
    said = driver.communicate(timeout=200)[1]
    assert driver.returncode == 0, said
    text = settings("gptq", str(source / "text.txt"), 10, 32)  # as the command line means it
    bitfold.quantize(source, quiet, bits=4, method="gptq", calibration=text)
    assert content(out) == content(quiet)


def test_memory_is_shared(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="2 workers"):
        bitfold.quantize(
            source, tmp_path / "out", bits=4, method="gptq", calibration=text_of(source), executor="processes",
            workers=2, max_memory=1_200_000_000,
        )  # fmt: skip
