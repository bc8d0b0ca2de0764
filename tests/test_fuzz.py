"""Readers of foreign bytes, on damaged input: our error or a sound answer, soon, in little memory. See fuzz/."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FUZZ = Path(__file__).parent.parent / "fuzz"
if not FUZZ.is_dir():
    pytest.skip("not a checkout: the fuzzers are not here", allow_module_level=True)
sys.path.append(str(FUZZ))
pytest.importorskip("gguf", reason="the gguf package (dev extra) writes a seed")

import mutate  # noqa: E402
import targets  # noqa: E402
from seeds import seeds  # noqa: E402

EXAMPLES = 250


@pytest.fixture(scope="module", params=list(targets.TARGETS))
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, list[bytes]]:
    """A reader, its folder, its sound inputs."""
    name: str = request.param
    return name, targets.prepare(name, tmp_path_factory.mktemp(name)), seeds(name)


def test_damaged_input(target: tuple[str, Path, list[bytes]]) -> None:
    """Mutations of sound inputs, the same ones every time."""
    name, folder, starts = target
    chance = random.Random(20260101)
    targets.check(name, starts[0], folder)  # warm: imports and caches are not the input's doing
    for _ in range(EXAMPLES):
        targets.check(name, mutate.mutated(name, chance.choice(starts), chance), folder)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300))
def test_any_bytes(target: tuple[str, Path, list[bytes]], data: bytes) -> None:
    """Noise with nothing of a checkpoint in it."""
    name, folder, _ = target
    targets.check(name, data, folder)


def test_the_check_sees_what_it_forbids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that hangs, hoards or raises something else is caught."""

    def hang(data: bytes, _folder: Path) -> None:
        end = time.process_time() + 1.1
        while time.process_time() < end:
            pass

    def hoard(data: bytes, _folder: Path) -> None:
        bytearray(200 << 20)[::4096] = b"x" * 51200

    def wrong(data: bytes, _folder: Path) -> None:
        raise KeyError("name")

    monkeypatch.setitem(targets.TARGETS, "header", hang)
    with pytest.raises(targets.Broken, match=r"\d s for"):
        targets.check("header", b"", tmp_path)
    monkeypatch.setitem(targets.TARGETS, "header", wrong)
    with pytest.raises(KeyError):
        targets.check("header", b"", tmp_path)
    if sys.platform == "linux":
        monkeypatch.setitem(targets.TARGETS, "header", hoard)
        with pytest.raises(targets.Broken, match="MiB"):
            targets.check("header", b"", tmp_path)
