"""Fixtures for the tests of the Hub; a test module names it in `pytest_plugins`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from bitfold.checkpoints.hub import errors as hub_errors
from hub_repos import Clock
from hub_server import HubServer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(hub_errors, "time", fake)
    return fake


@pytest.fixture
def library_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The same for the retries inside `huggingface_hub`."""
    fake = Clock()
    monkeypatch.setattr(_http, "time", fake)
    return fake


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock: Clock, library_clock: Clock) -> Iterator[HubServer]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server speaks plain HTTP and LFS
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # what a broken transfer can lose
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with HubServer() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running
