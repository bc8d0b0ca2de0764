"""Repository to repository on a disk that holds neither: bounded, resumable, the same tensors as with room."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import bitfold
import tiny_lm
from bitfold.checkpoints import open_source
from hub_server import HubServer

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
OPTIONS = ("--bits", "4", "--method", "rtn", "--max-shard-size", "300kB")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 12 MB in files of 2."""
    path = tmp_path_factory.mktemp("low") / "original"
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).to(torch.bfloat16).save_pretrained(path, max_shard_size="2MB")
    tiny_lm.tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def hub(original: Path) -> Iterator[HubServer]:
    with HubServer() as running:
        running.add_repo("org/original", {f.name: f.read_bytes() for f in original.iterdir() if f.is_file()})
        yield running


def start(hub: HubServer, place: Path, *words: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE_"))}
    environment |= {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(place / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_good",
        "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "bitfold", "quantize", "org/original", "-o", str(place / "work"), "--low-disk"]
    command += ["--upload-repo", "alice/small", *OPTIONS, *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def on_disk(place: Path) -> int:
    """Bytes that files really take; those that vanish meanwhile take none."""
    total = 0
    for folder, _, names in os.walk(place):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(folder) / name).stat().st_blocks * 512
    return total


class Watch:
    """The most that a folder took while a program ran."""

    def __init__(self, place: Path) -> None:
        self.most, self._place, self._on = 0, place, True
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while self._on:
            self.most = max(self.most, on_disk(self._place))
            time.sleep(0.01)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._on = False
        self._thread.join()


def sent(hub: HubServer) -> set[str]:
    repo = hub.repos.get("alice/small")
    return set() if repo is None else {name for files in repo.commits.values() for name in files}


def fetched(hub: HubServer, place: Path) -> Path:
    """The repository as it is now, in a folder."""
    repo, folder = hub.repos["alice/small"], place / "fetched"
    folder.mkdir()
    for name, content in repo.commits[repo.branches["main"]].items():
        (folder / name).write_bytes(content)
    return folder


def same(folder: Path, original: Path, place: Path) -> None:
    bitfold.quantize(original, place / "expected", bits=4, method="rtn")
    found, expected = open_source(folder), open_source(place / "expected")
    assert sorted(found.names()) == sorted(expected.names())
    assert all(torch.equal(found.read(name), expected.read(name)) for name in expected.names())
    a, b = (bitfold.load(path)(input_ids=torch.arange(9)[None]).logits for path in (folder, place / "expected"))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_with_little_disk(hub: HubServer, original: Path, tmp_path: Path) -> None:
    """At most two files of the source and two of the result at a time, and what is small."""
    whole = sum(f.stat().st_size for f in original.glob("*.safetensors"))
    largest = max(f.stat().st_size for f in original.glob("*.safetensors"))
    with Watch(tmp_path) as watch:
        run = start(hub, tmp_path)
        said, _ = run.communicate(timeout=600)
    assert run.returncode == 0, said
    assert watch.most < 3 * largest + 2_000_000 < whole
    assert not list((tmp_path / "work").glob("*.safetensors"))
    assert not (tmp_path / ".work.source").exists()
    folder = fetched(hub, tmp_path)
    assert len(list(folder.glob("*.safetensors"))) > 5
    same(folder, original, tmp_path)


def test_killed_in_the_middle_it_goes_on(hub: HubServer, original: Path, tmp_path: Path) -> None:
    """No file of the result is made or sent twice."""
    first = start(hub, tmp_path)
    end = time.monotonic() + 300
    while len([name for name in sent(hub) if name.endswith(".safetensors")]) < 2:
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.005)
    first.kill()
    first.wait()
    before = len(hub.seen("PUT", "/lfs/"))
    assert "config.json" not in sent(hub)  # nobody takes the half of it for a model
    again = start(hub, tmp_path)
    said, _ = again.communicate(timeout=600)
    assert again.returncode == 0, said
    assert "going on" in said
    folder = fetched(hub, tmp_path)
    files = len(list(folder.glob("*.safetensors")))
    assert len(hub.seen("PUT", "/lfs/")) - before <= files - 1
    same(folder, original, tmp_path)


def test_what_it_cannot_do_is_said_first(hub: HubServer, original: Path, tmp_path: Path) -> None:
    for words, text in (
        (("--method", "gptq"), "calibrated on the whole model"),
        (("--export", "gptq"), "only bitfold's own folders"),
    ):
        run = start(hub, tmp_path, *words)
        said, _ = run.communicate(timeout=600)
        assert run.returncode == 2, said
        assert text in said
    assert sent(hub) == set()
