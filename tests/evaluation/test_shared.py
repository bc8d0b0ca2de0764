"""Windows that several processes read: the numbers of one process, to the last digit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import forks
import tiny_lm
from bitfold.errors import CheckpointError, UsageError
from bitfold.evaluation import Evaluation, evaluate, shared
from tiny_lm import disturbed


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm.folder(tmp_path_factory.mktemp("lm") / "original", tiny_lm.model())


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm.folder(tmp_path_factory.mktemp("lm") / "changed", disturbed(tiny_lm.model(), 0.02))


def numbers(found: Evaluation) -> Evaluation:
    """Without what is otherwise each time."""
    return replace(found, seconds=0, tokens_per_second=0, peak_memory=0)


@pytest.mark.parametrize(("batch", "stride", "compared"), [(1, None, True), (2, 40, True), (3, None, False)])
def test_the_same_numbers_for_any_number_of_workers(
    original: Path, changed: Path, batch: int, stride: int | None, *, compared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overlapping windows count no token twice, whoever has the one before; a worker may have nothing to do."""
    forks.for_workers(monkeypatch)
    given = {"context": 64, "max_tokens": 5 * 64 + 9, "batch": batch, "stride": stride}
    against = original if compared else None
    here = evaluate(changed, against, tiny_lm.TEXT, **given)  # type: ignore[arg-type]
    for workers in (1, 2) if batch == 1 else (2,):
        there = evaluate(changed, against, tiny_lm.TEXT, executor="processes", workers=workers, **given)  # type: ignore[arg-type]
        assert numbers(there) == numbers(here)


@pytest.mark.parametrize(("windows", "batch"), [(1, 1), (5, 2), (7, 3), (10, 4), (64, 1)])
def test_shares_are_whole_batches(windows: int, batch: int) -> None:
    for workers in (1, 2, 3, 100):
        found = shared._shares(windows, batch, workers)
        assert [i for some in found for i in some] == list(range(windows))
        assert all(len(some) > 0 and some.start % batch == 0 for some in found)
        assert len(found) <= workers


def test_what_cannot_be_shared(original: Path, tmp_path: Path) -> None:
    two = {"executor": "processes", "workers": 2}
    for more in ({"cache_dir": tmp_path}, {"executor": "threads"}, {"executor": "local"}):
        with pytest.raises(UsageError):
            evaluate(original, None, tiny_lm.TEXT, context=64, **{**two, **more})  # type: ignore[arg-type]
    module = tiny_lm.model()
    with pytest.raises(UsageError, match="a module cannot be read by other processes"):
        evaluate(module, None, tiny_lm.TEXT, context=64, tokenizer=tiny_lm.tokenizer(), **two)  # type: ignore[arg-type]


def test_a_worker_of_another_version_is_refused(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forks.for_workers(monkeypatch)
    real = shared.software()
    monkeypatch.setattr(shared, "software", lambda: {**real, "torch": "1.0"})
    with pytest.raises(CheckpointError, match=r"different are torch \(.* here, 1\.0 there\)"):
        evaluate(original, None, tiny_lm.TEXT, context=64, executor="processes", workers=1)
