"""Uploading to the Hub: what is sent, what is refused, and a server that fails on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitfold.checkpoints.hub import fetch, upload
from bitfold.errors import CheckpointError, HubError
from hub_repos import INDEX, model, names, sharded, write
from hub_server import Fault, HubServer

pytest_plugins = ["hub_fixtures"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete checkpoint on disk."""
    return write(tmp_path / "out", {**sharded(), "README.md": b"---\nlicense: mit\n---\n"})


def test_upload_and_fetch_again(server: HubServer, folder: Path) -> None:
    write(folder, {".hidden": b"x", "model-c.safetensors.tmp": b"x"})
    url = upload.upload(folder, "alice/new", token="hf_good", commit_message="first")
    assert url == f"{server.url}/alice/new"
    assert server.repos["alice/new"].messages[-1] == "first"
    fetched = fetch.resolve("alice/new")
    assert names(fetched) == {"config.json", INDEX, "model-a.safetensors", "model-b.safetensors", "README.md"}
    assert all((fetched / name).read_bytes() == (folder / name).read_bytes() for name in names(fetched))


def test_upload_again_sends_nothing_and_deletes_stale_shards(server: HubServer, folder: Path, tmp_path: Path) -> None:
    upload.upload(folder, "new", token="hf_good")
    sent = len(server.seen("PUT", "/lfs/"))
    upload.upload(folder, "alice/new", token="hf_good")
    assert len(server.seen("PUT", "/lfs/")) == sent == 2
    upload.upload(write(tmp_path / "one", model()), "alice/new", token="hf_good")
    assert names(fetch.resolve("alice/new")) == {"config.json", "model.safetensors", "README.md"}


def test_upload_to_a_branch(server: HubServer, folder: Path) -> None:
    url = upload.upload(folder, "alice/new", token="hf_good", revision="3bit")
    assert url.endswith("/alice/new/tree/3bit")
    assert fetch.resolve("alice/new", revision="3bit").is_dir()
    with pytest.raises(HubError):
        fetch.resolve("alice/new")


def test_private_upload(server: HubServer, folder: Path) -> None:
    upload.upload(folder, "alice/secret", token="hf_good", private=True)
    assert server.repos["alice/secret"].private
    upload.upload(folder, "alice/open", token="hf_good")
    commits = len(server.repos["alice/open"].commits)
    with pytest.raises(HubError, match="exists and is public"):
        upload.upload(folder, "alice/open", token="hf_good", private=True)
    assert len(server.repos["alice/open"].commits) == commits


@pytest.mark.parametrize(
    ("method", "path", "fault"),
    [
        ("PUT", "/lfs/", Fault(status=500)),
        ("POST", "/api/repos/create", Fault(status=503, times=2)),
        ("POST", "/preupload/", Fault(status=429, headers={"Retry-After": "1"})),
        ("POST", "/commit/", Fault(status=502)),
        ("POST", "/commit/", Fault(status=429, headers={"Retry-After": "3"})),
        ("POST", "/commit/", Fault(reset_after=0)),
    ],
)
def test_upload_outlasts_a_failing_server(
    server: HubServer, folder: Path, method: str, path: str, fault: Fault
) -> None:
    server.add_repo("alice/new", {".gitattributes": b""})
    server.fail(method, path, fault)
    upload.upload(folder, "alice/new", token="hf_good")
    assert names(fetch.resolve("alice/new")) >= {"config.json", "model-a.safetensors", "model-b.safetensors"}


def test_upload_refused(server: HubServer, folder: Path) -> None:
    with pytest.raises(HubError, match="needs a login"):
        upload.upload(folder, "alice/new")
    with pytest.raises(HubError, match="invalid or has expired"):
        upload.upload(folder, "alice/new", token="hf_expired")
    with pytest.raises(HubError, match=r"forbids it.*right to write"):
        upload.upload(folder, "someone-else/new", token="hf_good")
    with pytest.raises(HubError, match="not a valid repository name"):
        upload.upload(folder, "alice/new--name", token="hf_good")
    assert server.repos == {}


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _bad_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _no_shard(folder: Path) -> None:
    (folder / "model-b.safetensors").unlink()


def _truncated(folder: Path) -> None:
    file = folder / "model-b.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _cut_header(folder: Path) -> None:
    file = folder / "model-b.safetensors"
    file.write_bytes(file.read_bytes()[:20])


def _other_tensor(folder: Path) -> None:
    save_file({"c": torch.zeros(3)}, folder / "model-b.safetensors")


def _no_weights(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_config, "no config.json"),
        (_bad_config, "not readable JSON"),
        (_no_shard, "model-b.safetensors: the index names this file"),
        (_truncated, "model-b.safetensors: truncated"),
        (_cut_header, "model-b.safetensors: truncated"),
        (_other_tensor, "tensor b is in the index but not in the file"),
        (_no_weights, "no safetensors weights"),
    ],
)
def test_an_incomplete_folder_is_not_uploaded(
    server: HubServer, folder: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        upload.upload(folder, "alice/new", token="hf_good")
    assert server.log == []
