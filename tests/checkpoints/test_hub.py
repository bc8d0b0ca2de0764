"""The Hub: what is fetched, what is refused, and every way in which a server can let one down.

Against a local server that speaks the Hub's protocol (hub_server.py), through the real `huggingface_hub`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file

from bitfold.checkpoints.hub import fetch, upload
from bitfold.errors import BitfoldError, CheckpointError, HubError, UsageError
from hub_repos import Clock, model, names, shard, sharded
from hub_server import Fault, HubServer

pytest_plugins = ["hub_fixtures"]


# -- what a name means -----------------------------------------------------------------------------------------------


def test_local_path_is_returned_as_is(tmp_path: Path) -> None:
    assert fetch.resolve(tmp_path) == tmp_path
    assert fetch.resolve(str(tmp_path)) == tmp_path
    with pytest.raises(UsageError, match="revision"):
        fetch.resolve(tmp_path, revision="main")


@pytest.mark.parametrize(
    "text",
    ["./model", "/no/such/model", "../a/b", "a/b/c", "~/model", "a\\b", "model.gguf", "dir/model.gguf", "a/x.bin", ""],
)
def test_a_path_that_does_not_exist_names_both_readings(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if text == "":
        with pytest.raises(CheckpointError):
            fetch.parse_repo(text)
        return
    with pytest.raises(CheckpointError, match="no such file or folder, and not the name of a Hub repository") as caught:
        fetch.resolve(text)
    assert caught.value.where == text


def test_a_path_object_is_never_a_repository(server: HubServer) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        fetch.resolve(Path("org/name"))
    assert server.log == []


@pytest.mark.parametrize(
    ("text", "repo", "file"),
    [
        ("gpt2", "gpt2", None),
        ("org/Name-1.5_b", "org/Name-1.5_b", None),
        ("org/name:x-Q4_0.gguf", "org/name", "x-Q4_0.gguf"),
        ("org/name/x-Q4_0.gguf", "org/name", "x-Q4_0.gguf"),
        ("org/name/sub/x.gguf", "org/name", "sub/x.gguf"),
    ],
)
def test_repository_names(text: str, repo: str, file: str | None) -> None:
    assert fetch.parse_repo(text) == fetch.RepoName(repo, file)


# -- what is fetched -------------------------------------------------------------------------------------------------


def test_only_what_is_read_is_fetched_and_only_once(server: HubServer) -> None:
    wanted = {**sharded(), "tokenizer.json": b"{}", "chat_template.jinja": b"x", "merges.txt": b"m", "README.md": b"r"}
    other = {
        "modeling.py": b"import os",
        "pytorch_model.bin": b"pickle",
        "consolidated.safetensors": shard("c"),
        "model.fp32.safetensors": shard("d"),
        "onnx/model.safetensors": shard("e"),
    }
    server.add_repo("org/name", {**wanted, **other})
    folder = fetch.resolve("org/name")
    assert names(folder) == set(wanted)
    assert all((folder / name).read_bytes() == content for name, content in wanted.items())
    before = len(server.seen("GET", "/resolve/|/cdn/"))
    assert fetch.resolve("org/name") == folder
    assert len(server.seen("GET", "/resolve/|/cdn/")) == before


def test_files_of_the_model_are_fetched_with_their_folders(server: HubServer) -> None:
    """Pooling, templates, vocabularies, weights of modules; no other packings, no adapters, code or films."""
    wanted = {
        **model(),
        "modules.json": b'[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]',
        "1_Pooling/config.json": b"{}",
        "2_Dense/config.json": b"{}",
        "2_Dense/model.safetensors": shard("dense"),
        "additional_chat_templates/tools.jinja": b"x",
        "language_model/5gram.bin": b"mmap lm",
        "vocab.bpe": b"x",
        "tokenizer.model.v3": b"x",
        "NOTICE": b"x",
    }
    other = {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": shard("a"),
        "checkpoint-9/config.json": b"{}",
        "checkpoint-9/model.safetensors": shard("b"),
        "onnx/config.json": b"{}",
        "onnx/model.onnx": b"x",
        "2_Dense/pytorch_model.bin": b"x",
        "training_args.bin": b"x",
        "tokenization.py": b"x",
        "assets/film.mp4": b"x",
    }
    server.add_repo("org/name", {**wanted, **other})
    assert names(fetch.resolve("org/name")) == set(wanted)


def test_one_file_is_taken_before_an_index(server: HubServer) -> None:
    """As transformers does; the shards are not fetched."""
    server.add_repo("org/name", {**sharded(), **model()})
    assert names(fetch.resolve("org/name")) - {"model.safetensors.index.json"} == set(model())


def test_an_adapter_is_no_model(server: HubServer) -> None:
    server.add_repo("org/name", {"adapter_config.json": b"{}", "adapter_model.safetensors": shard("a")})
    with pytest.raises(HubError, match="an adapter, not a model"):
        fetch.resolve("org/name")


def test_revision(server: HubServer) -> None:
    old = server.add_repo("org/name", model())
    server.add_repo("org/name", model(size=8), branch="v2")
    assert load_file(fetch.resolve("org/name") / "model.safetensors")["w"].numel() == 64
    assert load_file(fetch.resolve("org/name", revision="v2") / "model.safetensors")["w"].numel() == 8
    assert fetch.resolve("org/name", revision=old).name == old
    with pytest.raises(HubError, match="no such revision") as caught:
        fetch.resolve("org/name", revision="v3")
    assert caught.value.where == "org/name@v3"


def test_gguf_only_when_named(server: HubServer) -> None:
    server.add_repo("org/name", {"a-Q4_0.gguf": b"GGUF" * 10, "a-Q8_0.gguf": b"GGUF" * 20, "README.md": b""})
    assert fetch.resolve("org/name:a-Q4_0.gguf").read_bytes() == b"GGUF" * 10
    assert fetch.resolve("org/name/a-Q8_0.gguf").read_bytes() == b"GGUF" * 20
    with pytest.raises(HubError, match=r"org/name:a-Q4_0\.gguf"):
        fetch.resolve("org/name")
    with pytest.raises(HubError, match=r"no file b\.gguf.*a-Q4_0\.gguf, a-Q8_0\.gguf"):
        fetch.resolve("org/name:b.gguf")


def test_a_gguf_model_in_parts_is_fetched_whole(server: HubServer) -> None:
    parts = {f"sub/m-{i:05d}-of-00003.gguf": b"GGUF" * i for i in (1, 2, 3)}
    server.add_repo("org/name", {**parts, "other-00001-of-00003.gguf": b"GGUF"})
    path = fetch.resolve("org/name:sub/m-00002-of-00003.gguf")
    assert path.read_bytes() == b"GGUF" * 2
    assert sorted(p.name for p in path.parent.iterdir()) == [name.removeprefix("sub/") for name in parts]
    assert not list(path.parents[1].glob("other*"))


def test_pickled_weights_are_refused_before_anything_is_fetched(server: HubServer) -> None:
    server.add_repo("org/name", {"config.json": b"{}", "pytorch_model.bin": b"x" * 1000})
    with pytest.raises(HubError, match=r"pickled PyTorch weights.*save_pretrained"):
        fetch.resolve("org/name")
    assert server.seen("GET", "/resolve/") == []


@pytest.mark.parametrize(
    ("files", "message"),
    [({"model.safetensors": shard("w")}, "no config.json"), ({"config.json": b"{}"}, "no safetensors")],
)
def test_not_a_model(server: HubServer, files: dict[str, bytes], message: str) -> None:
    server.add_repo("org/name", files)
    with pytest.raises(HubError, match=message):
        fetch.resolve("org/name")


# -- a server that fails ---------------------------------------------------------------------------------------------


def test_dropped_connection_resumes_inside_the_file(server: HubServer) -> None:
    files = model(size=1 << 18)  # 1 MiB
    server.add_repo("org/name", files)
    server.fail("GET", "/cdn/", Fault(drop_after=700_000))
    folder = fetch.resolve("org/name")
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    first, second = server.seen("GET", "/cdn/")
    assert "range" not in first.headers
    start = int(second.headers["range"].removeprefix("bytes=").removesuffix("-"))
    assert 700_000 - (1 << 16) <= start <= 700_000
    assert server.bytes_sent < len(files["model.safetensors"]) + (1 << 16) + 20_000


def test_reset_connection_fetches_that_file_again_and_no_other(server: HubServer, clock: Clock) -> None:
    files = sharded(size=1 << 16)
    server.add_repo("org/name", files)
    server.fail("GET", "/cdn/.*model-b", Fault(reset_after=100_000))
    folder = fetch.resolve("org/name")
    assert all((folder / name).read_bytes() == content for name, content in files.items())
    assert len(server.seen("GET", "/cdn/.*model-a")) == 1
    assert clock.waits == [1.0]


def test_a_connection_that_always_breaks_ends_in_an_error(server: HubServer, clock: Clock, tmp_path: Path) -> None:
    server.add_repo("org/name", model(size=1 << 16))
    server.fail("GET", "/cdn/", Fault(reset_after=70_000, times=1000))
    with pytest.raises(HubError, match=r"connection broke 5 times.*run the command again"):
        fetch.resolve("org/name")
    assert clock.waits == [1, 2, 4, 8]
    assert not list((tmp_path / "cache").rglob("model.safetensors"))


def test_rate_limit_waits_as_long_as_it_is_told(server: HubServer, clock: Clock) -> None:
    server.add_repo("org/name", model())
    server.fail("GET", "/api/models/", Fault(status=429, headers={"Retry-After": "7"}, times=2))
    assert names(fetch.resolve("org/name")) == {"config.json", "model.safetensors"}
    assert clock.waits == [7, 7]


def test_rate_limit_on_a_file(server: HubServer, library_clock: Clock) -> None:
    server.add_repo("org/name", model())
    server.fail("GET", "/cdn/", Fault(status=429, headers={"Retry-After": "11"}))
    assert "model.safetensors" in names(fetch.resolve("org/name"))
    assert len(server.seen("GET", "/cdn/")) == 2
    assert 11 <= library_clock.waits[0] <= 12


@pytest.mark.parametrize(("after", "requests"), [("2", 5), ("3600", 1)])
def test_rate_limit_without_end(server: HubServer, clock: Clock, after: str, requests: int) -> None:
    server.add_repo("org/name", model())
    server.fail("GET", "/api/models/", Fault(status=429, headers={"Retry-After": after}, times=1000))
    with pytest.raises(HubError, match=f"limits the rate.*in {after} s.*hf auth login"):
        fetch.resolve("org/name")
    assert len(server.seen("GET", "/api/models/")) == requests
    assert sum(clock.waits) <= 8


@pytest.mark.parametrize("path", ["/api/models/org/name$", "/tree/", "/resolve/.*config.json", "/cdn/"])
def test_server_errors_are_waited_out(server: HubServer, path: str) -> None:
    server.add_repo("org/name", model())
    server.fail("GET", path, Fault(status=503, times=2))
    assert names(fetch.resolve("org/name")) == {"config.json", "model.safetensors"}


def test_a_failing_server_is_an_error_even_with_an_older_copy_in_the_cache(server: HubServer) -> None:
    server.add_repo("org/name", model())
    fetch.resolve("org/name")
    server.add_repo("org/name", model(size=8))
    server.fail("GET", "/api/models/", Fault(status=500, times=1000))
    with pytest.raises(HubError, match="failed with status 500, 5 times"):
        fetch.resolve("org/name")


@pytest.mark.parametrize(("path", "message"), [("/revision/", "an older commit"), ("/tree/", "failed with status 500")])
def test_a_failure_half_way_never_yields_an_older_commit(server: HubServer, path: str, message: str) -> None:
    """`snapshot_download` alone would answer with the copy of the older commit, without a word."""
    server.add_repo("org/name", model())
    fetch.resolve("org/name")
    server.add_repo("org/name", model(size=8))
    server.fail("GET", path, Fault(status=500, times=1000))
    with pytest.raises(HubError, match=message):
        fetch.resolve("org/name")


# -- who one is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["argument", "HF_TOKEN", "stored"])
def test_token_from_the_usual_places(
    server: HubServer, how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.add_repo("org/name", model())
    server.repos["org/name"].private = True
    if how == "HF_TOKEN":
        monkeypatch.setenv("HF_TOKEN", "hf_good")
    elif how == "stored":
        (tmp_path / "no-token").write_text("hf_good")
    assert fetch.resolve("org/name", token="hf_good" if how == "argument" else None).is_dir()
    assert all("authorization" not in r.headers for r in server.log if r.origin == "cdn")
    assert all(r.headers["authorization"] == "Bearer hf_good" for r in server.log if r.origin == "hub")


def test_expired_token(server: HubServer) -> None:
    server.add_repo("org/name", model())
    with pytest.raises(HubError, match=r"invalid or has expired.*hf auth login") as caught:
        fetch.resolve("org/name", token="hf_expired")
    assert "hf_expired" not in str(caught.value)
    assert len(server.log) == 1


def test_token_that_expires_on_the_way(server: HubServer) -> None:
    server.add_repo("org/name", model())
    refused = {"X-Error-Message": "Invalid credentials in Authorization header"}
    server.fail("HEAD", "/resolve/.*safetensors", Fault(status=401, headers=refused, times=1000))
    with pytest.raises(HubError, match="invalid or has expired"):
        fetch.resolve("org/name", token="hf_good")


@pytest.mark.parametrize(("token", "message"), [(None, "is private, log in"), ("hf_good", "this token may not see it")])
def test_private_or_missing(server: HubServer, token: str | None, message: str) -> None:
    with pytest.raises(HubError, match=f"no such repository.*{message}.*no file or folder has this name"):
        fetch.resolve("org/absent", token=token)


def test_a_folder_misspelt(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was meant is a folder, so the error begins with folders, whatever the Hub says or does not say."""
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("my-modle", "./my-modle", str(tmp_path / "my-modle")):
        with pytest.raises(BitfoldError, match=r"no file or folder|no such file or folder") as caught:
            fetch.resolve(name)
        assert f"did you mean {Path(name).parent / 'my-model'}?" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="no model is named"):
        fetch.resolve("")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"no such folder here, and the Hub cannot be reached.*did you mean my-model"):
        fetch.resolve("my-modle")
    with pytest.raises(HubError, match=r"no such folder here.*\(check the connection"):
        fetch.resolve("another")


def test_gated(server: HubServer) -> None:
    server.add_repo("org/name", model())
    server.repos["org/name"].gated = True
    with pytest.raises(HubError, match=r"gated.*accept its terms.*hf auth login"):
        fetch.resolve("org/name")
    assert fetch.resolve("org/name", token="hf_good").is_dir()


def test_check_login(server: HubServer) -> None:
    assert upload.check_login("hf_good") == "alice"
    with pytest.raises(HubError, match="invalid or has expired"):
        upload.check_login("hf_expired")
    with pytest.raises(HubError, match="not logged in"):
        upload.check_login()


# -- no connection ---------------------------------------------------------------------------------------------------


def test_offline_uses_the_cache(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add_repo("org/name", model())
    folder = fetch.resolve("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    seen = len(server.log)
    assert fetch.resolve("org/name") == folder
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE.*no complete copy"):
        fetch.resolve("org/other")
    assert len(server.log) == seen


def test_unreachable_uses_the_cache_and_says_so(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add_repo("org/name", model())
    folder = fetch.resolve("org/name")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.warns(UserWarning, match="cannot be reached; using the copy fetched earlier"):
        assert fetch.resolve("org/name") == folder
    with pytest.raises(HubError, match=r"cannot be reached.*check the connection"):
        fetch.resolve("org/other")


def test_half_a_copy_in_the_cache_is_no_copy(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add_repo("org/name", sharded())
    (fetch.resolve("org/name") / "model-b.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="no complete copy"):
        fetch.resolve("org/name")
