"""`--device` and `--max-gpu-memory`: what is not there is said, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitfold.system import backend
from cli_runs import Bitfold


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_is_there", lambda kind: False)


def commands(quantized: Path, model: Path, text: Path) -> list[tuple[object, ...]]:
    sizes = ("--text", text, "--context", 64, "--max-tokens", 128)
    return [
        ("quantize", model, "--bits", 4, "--method", "rtn", "--dry-run"),
        ("eval", quantized, *sizes),
        ("layers", quantized, "--reference", model, *sizes),
        ("generate", quantized, "Line", "--max-new-tokens", 2),
    ]


def test_a_device_that_is_not_there_is_refused(bitfold: Bitfold, model: Path, quantized: Path, text: Path) -> None:
    for command in commands(quantized, model, text):
        result = bitfold(*command, "--device", "cuda")
        assert result.code == 2
        assert result.err.startswith("error: --device: PyTorch ")
        assert "hint: there is cpu" in result.err


def test_a_ceiling_without_an_accelerator_is_refused(
    bitfold: Bitfold, model: Path, quantized: Path, text: Path
) -> None:
    for command in commands(quantized, model, text):
        result = bitfold(*command, "--max-gpu-memory", "2GB")
        assert result.code == 2
        assert "hint: --max-memory is for the CPU's" in result.err
        assert bitfold(*command, "--max-gpu-memory", "much").code == 2


def test_auto_says_what_it_took(bitfold: Bitfold, model: Path, quantized: Path, text: Path) -> None:
    for command in commands(quantized, model, text):
        result = bitfold(*command, "--device", "auto")
        assert result.code == 0
        assert "device: cpu" in result.err


def test_flags_of_the_native_engine_are_refused_elsewhere(
    bitfold: Bitfold, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_is_there", lambda kind: kind == "xpu")
    monkeypatch.setattr(backend, "describe", str)
    result = bitfold("generate", quantized, "Line", "--device", "auto", "--cache", "int8")
    assert result.code == 2
    assert "--cache" in result.err
