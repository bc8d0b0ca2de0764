"""Quantizing and distilling in one call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bitfold
import tiny_lm
from bitfold.calibration.options import Calibration
from bitfold.errors import ModelError, UsageError
from bitfold.recipes.options import MethodOptions
from bitfold.run import learning
from bitfold.run.learning import quantize_and_distill
from bitfold.run.options import Request, RunOptions


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tiny_lm.folder(tmp_path / "source", tiny_lm.model())
    (folder / "text.txt").write_text(tiny_lm.TEXT, encoding="utf-8")
    return folder


def request(source: Path, out: Path, **more: str) -> Request:
    text = Calibration(str(source / "text.txt"), nsamples=2, seqlen=32)
    return Request(str(source), out, MethodOptions(bits=2, method="trellis"), text, **more)


def test_both_end_in_one_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure between them leaves nothing to be seen, and the same call does only what is left."""
    out, options = tmp_path / "out", RunOptions()

    def fail(*_: object, **__: object) -> None:
        raise ModelError("it fails")

    with monkeypatch.context() as patch:
        patch.setattr(learning, "distill", fail)
        with pytest.raises(ModelError, match="it fails"):
            quantize_and_distill(request(source, out), options, 0.1)
    assert not out.exists()
    report, found = quantize_and_distill(request(source, out), options, 0.1)
    assert report is None
    assert found is not None
    assert found.kl_after <= found.kl_before
    assert "distilled" in json.loads((out / "config.json").read_text())["quantization_config"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert bitfold.load(out) is not None


def test_what_cannot_be_distilled_is_refused_before_the_work(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="own folders"):
        quantize_and_distill(request(source, tmp_path / "m.gguf", export="gguf:Q8_0"), RunOptions(), 1.0)
    report, found = quantize_and_distill(request(source, tmp_path / "out"), RunOptions(dry_run=True), 1.0)
    assert found is None
    assert report is not None
    assert not (tmp_path / "out").exists()
