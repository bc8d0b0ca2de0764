"""The program in this process, and what it works on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny_lm
from bitfold.cli import app
from bitfold.run import driver
from bitfold.system import progress
from cli_runs import Bitfold, Run


@pytest.fixture
def bitfold(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Bitfold]:
    """Run the program in this process."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", os.environ.get("TRANSFORMERS_VERBOSITY", "error"))
    monkeypatch.delenv("BITFOLD_DEBUG", raising=False)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def run(*args: object) -> Run:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app([str(a) for a in args], prog_name="bitfold")
        out, err = capsys.readouterr()
        return Run(int(ended.value.code or 0), out, err)

    yield run
    progress.enable(False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm.folder(tmp_path_factory.mktemp("cli") / "model", tiny_lm.model())


@pytest.fixture(scope="module")
def quantized(model: Path) -> Path:
    out = model.parent / "quantized"
    driver.quantize(model, out, bits=4, group_size=32)
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny_lm.TEXT, encoding="utf-8")
    return path
