"""A machine with much memory quantizes and pushes, a small one pulls and loads: same logits, a third of the memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hub_server import HubServer
from numerics import check_same_answers

MACHINES = Path(__file__).parents[1] / "hub_machines.py"
SLACK = 24 << 20  # bytes: what a download, the tokens' embeddings and the allocator take whatever the model's size


def run(machine: str, folder: Path, hub: HubServer, *, token: str = "") -> str:
    """Run one of the machines with a Hugging Face home of its own; returns what it printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE_"))}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / f"home-{machine}"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "2",
        **({"HF_TOKEN": token} if token else {}),
    }
    command = [sys.executable, str(MACHINES), machine, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def size(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, Path]]:
    folder = tmp_path_factory.mktemp("roundtrip")
    with HubServer() as hub:
        run("large", folder, hub, token="hf_good")
        yield hub, folder


def test_the_small_machine_loads_what_the_large_one_pushed(pushed: tuple[HubServer, Path]) -> None:
    hub, folder = pushed
    report = json.loads(run("small", folder, hub).splitlines()[-1])
    check_same_answers(torch.load(folder / "pulled.pt"), torch.load(folder / "logits.pt"))
    assert report["meta"] == []
    original, quantized = size(folder / "original"), size(folder / "quantized")
    assert quantized < 0.35 * original
    if report["rise"] is not None:
        assert report["rise"] < 1.3 * quantized + SLACK < 0.6 * original


def test_transformers_pulls_the_same_model(pushed: tuple[HubServer, Path]) -> None:
    hub, folder = pushed
    run("transformers", folder, hub)
    check_same_answers(torch.load(folder / "transformers.pt"), torch.load(folder / "logits.pt"))
