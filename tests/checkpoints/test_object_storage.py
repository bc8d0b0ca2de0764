"""Models that come from object storage and go there: in memory always, by S3's protocol where its libraries are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

import bitfold
import tiny_lm
from bitfold.checkpoints import object_storage as module
from bitfold.checkpoints.hub.fetch import resolve
from bitfold.errors import BitfoldError, CheckpointError, UsageError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm.folder(tmp_path_factory.mktemp("objects") / "source", tiny_lm.model())


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """A bucket on a server of this process."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    thread = server.ThreadedMotoServer(port=0)
    thread.start()
    host, port = thread.get_host_and_port()
    said = {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in said}
    os.environ.update(said)
    fsspec.filesystem("s3").mkdir("bucket")
    yield "s3://bucket"
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
    thread.stop()


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_WAIT", 0.001)
    root = "memory://bucket" if request.param == "memory" else request.getfixturevalue("s3")
    return f"{root}/{request.node.name.partition('[')[0]}"


def test_a_model_goes_there_and_comes_back(source: Path, store: str, tmp_path: Path) -> None:
    """Quantized from a place in storage to another one, and run from there."""
    assert module.send(source, f"{store}/model") == f"{store}/model"
    there = fsspec.core.url_to_fs(store)[0]
    there.pipe(f"{store}/model/pytorch_model.bin", b"a pickle that nobody fetches")
    report = bitfold.quantize(f"{store}/model", tmp_path / "out", format="int8", upload_repo=f"{store}/quantized")
    assert report.url == f"{store}/quantized"
    local = resolve(f"{store}/model")
    assert not (local / "pytorch_model.bin").exists()
    once = bitfold.load(tmp_path / "out")(input_ids=torch.arange(8)[None]).logits
    assert torch.equal(once, bitfold.load(f"{store}/quantized")(input_ids=torch.arange(8)[None]).logits)


def test_what_is_in_the_cache_is_fetched_again_only_if_it_changed(source: Path, store: str) -> None:
    module.send(source, store)
    folder = module.fetch(store)
    times = {file: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
    assert times
    assert module.fetch(store) == folder
    assert {file: file.stat().st_mtime_ns for file in times} == times
    config = json.loads((source / "config.json").read_text())
    system, path = fsspec.core.url_to_fs(store)
    system.pipe(f"{path}/config.json", json.dumps({**config, "changed": True}).encode())
    assert json.loads((module.fetch(store) / "config.json").read_text())["changed"] is True


def test_a_folder_looks_whole_only_once_it_is(source: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module._Place.upload

    def breaking(place: Any, file: Path, name: str) -> None:
        if name == "config.json":
            raise CheckpointError("the storage fails")
        real(place, file, name)

    monkeypatch.setattr(module._Place, "upload", breaking)
    with pytest.raises(CheckpointError, match="fails"):
        module.send(source, store)
    with pytest.raises(BitfoldError, match=r"has no config\.json"):
        module.fetch(store)
    monkeypatch.undo()
    module.send(source, store)  # what is there of a first attempt is no model
    with pytest.raises(CheckpointError, match="a model already"):
        module.send(source, store)


def test_a_storage_that_fails_for_a_moment_is_asked_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = "memory://bucket/fails"
    monkeypatch.setattr(module, "_WAIT", 0.001)
    module.send(source, store)
    system = fsspec.core.url_to_fs(store)[0]
    real, failures = type(system).get_file, iter([OSError("503 Slow Down"), TimeoutError("no answer")])

    def failing(*args: Any, **more: Any) -> Any:
        for error in failures:
            raise error
        return real(*args, **more)

    monkeypatch.setattr(type(system), "get_file", failing)
    assert module.fetch(store, tmp_path).is_dir()
    monkeypatch.setattr(type(system), "find", lambda *_, **__: (_ for _ in ()).throw(OSError("503 Slow Down")))
    waits = list[float]()
    monkeypatch.setattr(module, "_sleep", waits.append)
    with pytest.raises(CheckpointError, match="503 Slow Down"):
        module.fetch(f"{store}/other", tmp_path)
    assert waits == [0.001, 0.002, 0.004]  # they grow, and end


def test_a_file_that_came_short_is_not_taken(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = "memory://bucket/short"
    module.send(source, store)
    system = fsspec.core.url_to_fs(store)[0]
    real = type(system).get_file

    def short(self: Any, remote: str, local: str, **more: Any) -> None:
        real(self, remote, local, **more)
        if remote.endswith(".safetensors"):
            os.truncate(local, 1000)

    monkeypatch.setattr(type(system), "get_file", short)
    with pytest.raises(CheckpointError, match="1000 bytes came"):
        module.fetch(store, tmp_path)
    monkeypatch.setattr(type(system), "get_file", real)
    assert module.fetch(store, tmp_path).is_dir()


@pytest.mark.parametrize(
    ("url", "error", "words"),
    [
        ("memory://bucket/nothing", CheckpointError, "nothing"),
        ("nosuch://bucket/model", UsageError, "nosuch"),
    ],
)
def test_places_that_cannot_be_read_are_named(url: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        resolve(url)


def test_an_index_cannot_reach_out_of_its_folder(source: Path, tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/evil/config.json", (source / "config.json").read_bytes())
    index = {"metadata": {}, "weight_map": {"a": "../../outside.safetensors"}}
    system.pipe("/evil/model.safetensors.index.json", json.dumps(index).encode())
    system.pipe("/evil/model-00001-of-00001.safetensors", b"x")
    with pytest.raises(CheckpointError, match="not in the folder"):
        module.fetch("memory://evil", tmp_path)


def test_the_output_folder_is_a_folder_here(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="place in object storage") as found:
        bitfold.quantize(source, "s3://bucket/out", bits=8)
    assert "bitfold upload FOLDER s3://" in str(found.value.hint)
    assert not Path("s3:").exists()
