"""Predictions on disk: what is stored comes back within the bound of its steps, the likeliest entry exactly."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitfold.errors import UsageError
from bitfold.evaluation.predictions import OCTAVE, STEP, DiskPredictions, Writer, pack_rows, unpack_rows


def test_a_full_disk_is_found_out_before_writing(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "p", total_rows=10**15)
    with pytest.raises(UsageError, match="GB are free"):
        writer.append(torch.zeros(2, 1000))
    writer.close(complete=False)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_write_the_same_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither gets into the other's file, and what lies there from long ago is removed, what is new is not."""
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    for name, age in (("p.1.partial", 10**6), ("p.2.partial", 0), ("q.3.partial", 10**6)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, times=(time.time() - age,) * 2)
    writers = []
    for process in (1001, 1002):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        writers.append(Writer(tmp_path / "p", total_rows=6))
    for rows in logits.split(3):
        for writer in writers:
            writer.append(rows)
    for writer in writers:
        writer.close(complete=True)
        assert torch.equal(DiskPredictions(tmp_path / "p", 50).take(6), unpack_rows(pack_rows(logits)))
    assert {path.name for path in tmp_path.iterdir()} == {"p", "p.2.partial", "q.3.partial"}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 30.0))
def test_stored_rows(seed: int, spread: float) -> None:
    logits = spread * torch.randn(4, 500, generator=torch.Generator().manual_seed(seed))
    logits[:, 3] = -torch.inf
    exact, stored = logits.double().log_softmax(-1), unpack_rows(pack_rows(logits)).double()
    assert torch.equal(stored.argmax(-1), logits.argmax(-1))
    assert stored.exp().sum(-1) == pytest.approx(torch.ones(4), abs=1e-5)
    kept = logits > logits.max(-1, keepdim=True).values - 30
    grain = STEP * torch.exp2(((logits.max(-1, keepdim=True).values - logits) / OCTAVE).floor())
    assert ((stored - exact).abs() < 1.5 * STEP + grain + 1e-5 * spread)[kept].all()
    assert (stored[~kept] < -25).all()
    assert (stored[:, 3] == -torch.inf).all()
    kl = (exact.exp() * (exact - stored)).nan_to_num(0.0, 0.0, 0.0).sum(-1)
    # p step^2 / 24 for each entry, p <= exp(-d), the step doubling every OCTAVE: at most step^2 / 24 sqrt(p) in sum
    assert (kl.abs() < STEP**2 * math.sqrt(500) + 1e-6).all()


def test_the_likeliest_entry_survives_rounding() -> None:
    logits = torch.tensor([[1.0, 1.0 + STEP / 10, 0.0], [0.0, 2.0, 2.0]])
    assert unpack_rows(pack_rows(logits)).argmax(-1).tolist() == logits.argmax(-1).tolist() == [1, 1]
