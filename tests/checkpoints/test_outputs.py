"""Where output goes: written into, or refused before the work; for every command that writes."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import bitfold
from bitfold.checkpoints import convert, staging
from bitfold.checkpoints.staging import open_output, partial_of, publish, written_aside
from bitfold.errors import BitfoldError, CheckpointError, UsageError
from bitfold.system import outputs
from bitfold.system.outputs import real_path, try_file, try_folder

Write = Callable[[Path, Path | str], object]


def _save(source: Path, out: Path | str) -> None:
    model = LlamaForCausalLM.from_pretrained(source)
    bitfold.quantize_(model, "int8")
    bitfold.save(model, out)


WRITE: dict[str, Write] = {
    "quantize": lambda source, out: bitfold.quantize(source, out, bits=8),
    "convert": lambda source, out: convert(source, out),
    "save": _save,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("source") / "m"
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def whole(folder: Path) -> bool:
    """A model folder with nothing of the work left in or beside it."""
    parts = {p.name for p in folder.iterdir()}
    beside = [p for p in folder.parent.iterdir() if p.name.endswith(".partial")]
    return {"config.json", "model.safetensors"} <= parts and not beside and not any(p.startswith(".") for p in parts)


@pytest.mark.parametrize("command", WRITE)
@pytest.mark.parametrize(
    "place",
    [".", "./x/../y", "y/", "link", "dangling", "new/parents/y", "empty", "home", "n" * 250, "lost", "file-system"],
)
def test_written_into(command: str, place: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever names an empty folder, or one that is not there yet, is written; a folder that is there stays itself."""
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "disk").mkdir()
    (here / "empty").mkdir(mode=0o750)
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    monkeypatch.setenv("HOME", str(tmp_path))
    out, real = {
        ".": (".", here / "empty"), "link": (tmp_path / "link", tmp_path / "disk"), "home": ("~/h", tmp_path / "h"),
        "dangling": (tmp_path / "dangling", tmp_path / "later"), "./x/../y": ("./x/../y", here / "empty" / "y"),
        "y/": ("y/", here / "empty" / "y"), "lost": (here / "empty", here / "empty"),
        "file-system": (here / "empty", here / "empty"), "empty": (here / "empty", here / "empty"),
    }.get(place, (here / place, here / place))  # fmt: skip
    if place == "lost":
        (here / "empty" / "lost+found").mkdir()
    monkeypatch.chdir(here / "empty")
    if place in ("./x/../y", "y/"):
        (here / "empty" / "x").mkdir()
    before = real.stat().st_ino if real.exists() else None
    if place == "file-system":  # as a mount point is: it can be neither removed nor replaced
        monkeypatch.setattr(Path, "rmdir", _busy(real, Path.rmdir))
    WRITE[command](source, out)
    assert whole(real)
    assert before in (None, real.stat().st_ino)
    assert bitfold.load(real) is not None if command != "convert" else True


def _busy(mount: Path, rmdir: Callable[[Path], None]) -> Callable[[Path], None]:
    def refuse(path: Path) -> None:
        if path == mount:
            raise OSError(errno.EBUSY, "Device or resource busy")
        rmdir(path)

    return refuse


def _refused_places(tmp_path: Path, source: Path) -> dict[str, Path | str]:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "to-file").symlink_to(tmp_path / "file")
    (tmp_path / "to-full").symlink_to(tmp_path / "full")
    os.mkfifo(tmp_path / "pipe")
    return {
        "file": tmp_path / "file", "full": tmp_path / "full", "circle": tmp_path / "circle",
        "to-file": tmp_path / "to-file",
        "to-full": tmp_path / "to-full", "pipe": tmp_path / "pipe", "below a file": tmp_path / "file" / "out",
        "within the source": source / "out", "source": source, "too long": tmp_path / ("n" * 300), "root": "/",
        "too long below": tmp_path / ("n" * 300) / "out", "device": "/dev/null", "no home": "~nobody-of-this-name/x",
    }  # fmt: skip


PLACES = (
    *("file", "full", "circle", "to-file", "to-full", "pipe", "below a file", "within the source", "source"),
    *("too long", "root", "too long below", "device", "no home"),
)


@pytest.mark.skipif(os.name == "nt", reason="pipes and links of POSIX")
@pytest.mark.parametrize("command", ["quantize", "convert"])
@pytest.mark.parametrize("place", PLACES)
def test_refused_before_the_work(
    command: str, place: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In words, before a tensor is read, and nothing is left or changed."""
    out = _refused_places(tmp_path, source)[place]
    before = sorted(tmp_path.rglob("*")), sorted(source.rglob("*"))
    monkeypatch.setattr(bitfold.checkpoints.safetensors.SafetensorsSource, "read", None)  # type: ignore[attr-defined]
    with pytest.raises(BitfoldError) as caught:
        WRITE[command](source, out)
    assert isinstance(caught.value, (CheckpointError, UsageError))
    assert (sorted(tmp_path.rglob("*")), sorted(source.rglob("*"))) == before


@pytest.mark.parametrize("command", ["quantize", "convert"])
def test_read_only_places(command: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried by making a file, since rights do not tell of a read-only disk (nor bind who runs as root)."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(outputs.tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        WRITE[command](source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_needs_no_output(source: Path) -> None:
    assert bitfold.quantize(source, "/dev/null", bits=8, dry_run=True).tensors is not None


@pytest.mark.parametrize("there", [True, False], ids=["an empty folder", "no folder"])
@pytest.mark.parametrize("moved", [0, 1, 2])
def test_the_last_step_can_be_cut_short(
    there: bool, moved: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while files get their places, the same command ends the move: the same folder as without."""
    out = tmp_path / "out"
    if there:
        out.mkdir()
    bitfold.quantize(source, tmp_path / "reference", bits=8)
    rename, count = Path.rename, 0

    def stop(path: Path, target: Path) -> Path:
        nonlocal count
        if count == moved and path.parent.name in ("result", ".partial", ".out.partial"):
            raise KeyboardInterrupt
        count += path.parent.name in ("result", ".partial", ".out.partial")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop)
        try:
            bitfold.quantize(source, out, bits=8)
        except KeyboardInterrupt:
            assert not (out / "config.json").exists()
    if not out.is_dir() or partial_of(out).exists():
        bitfold.quantize(source, out, bits=8)
    assert whole(out)
    same = [
        n
        for n in ("model.safetensors", "config.json")
        if (out / n).read_bytes() == (tmp_path / "reference" / n).read_bytes()
    ]
    assert len(same) == 2


def test_unfinished_work_is_not_thrown_away(source: Path, tmp_path: Path) -> None:
    """`convert` into the same folder would remove the journal of a run of hours."""
    partial = partial_of(tmp_path / "out")
    partial.mkdir()
    (partial / staging.JOURNAL).write_text("x")
    with pytest.raises(CheckpointError, match="unfinished work"):
        convert(source, tmp_path / "out")
    assert (partial / staging.JOURNAL).exists()


def _fail_halfway(out: Path) -> None:
    with written_aside(open_output(out)) as folder:
        (folder / "half").write_text("x")
        raise ZeroDivisionError


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    for name in ("new", "there"):
        out = tmp_path / name
        if name == "there":
            out.mkdir()
        with pytest.raises(ZeroDivisionError):
            _fail_halfway(out)
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]


def test_config_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where files are moved one by one, no loader sees half a model."""
    (tmp_path / "out").mkdir()
    (tmp_path / "work").mkdir()
    for name in ("z.json", "config.json", "a"):
        (tmp_path / "work" / name).write_text("x")
    seen: list[str] = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: (seen.append(self.name), rename(self, to))[1])
    publish(tmp_path / "work", tmp_path / "out")
    assert seen == ["a", "z.json", "config.json"]


@pytest.mark.parametrize("kind", ["folder", "no parent", "below a file", "too long", "read-only"])
def test_files(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of reports, pictures and events."""
    (tmp_path / "file").write_text("kept")
    bad = {"folder": tmp_path, "no parent": tmp_path / "a" / "b", "below a file": tmp_path / "file" / "x"}
    if kind == "read-only":
        monkeypatch.setattr(
            Path, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system"))
        )
    with pytest.raises((UsageError, CheckpointError)):
        try_file(bad.get(kind, tmp_path / (300 * "n" if kind == "too long" else "x")))
    monkeypatch.undo()
    assert try_file(tmp_path / "file").read_text() == "kept"
    assert try_file(tmp_path / "new") == tmp_path / "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_events_are_tried_at_the_start(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        bitfold.quantize(source, tmp_path / "out", bits=8, events=tmp_path / "none" / "events.jsonl")
    bitfold.quantize(source, tmp_path / "out", bits=8, events=tmp_path / "events.jsonl")
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[0])["event"] == "begin"


def test_real_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert real_path(".") == real_path("~") == real_path("a/../") == tmp_path.resolve()
    with pytest.raises(UsageError, match="not a path"):
        real_path("a\0b")
    try_folder(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
