"""Documents: files, folders, and data sets of a Hub that speaks the protocol."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitfold.errors import BitfoldError, CheckpointError, UsageError
from bitfold.text import windows as texts
from bitfold.text.documents import documents
from hub_server import HubServer

CARD = """---
configs:
- config_name: a
  data_files: [{split: test, path: a/test.jsonl}]
- config_name: b
  data_files: [{split: valid, path: b/valid.jsonl}, {split: train, path: b/train.jsonl}]
---
"""
ASK = """
import sys
from bitfold.text.documents import documents
from bitfold.errors import BitfoldError
for spec in sys.argv[1:]:
    try:
        print(spec, *documents(spec, split="test"), sep="|")
    except BitfoldError as error:
        print(spec, type(error).__name__, error.what, error.hint, sep="|")
"""


def parquet(**columns: list[str]) -> bytes:
    """A file that pyarrow writes."""
    arrow = pytest.importorskip("pyarrow", reason="datasets is not installed (pip install 'bitfold[eval]')")
    out = io.BytesIO()
    arrow.parquet.write_table(arrow.table(columns), out)
    return out.getvalue()


def test_lines_of_json(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": "one"}\n\n{"text": "two\u2028too", "id": 2}\r\n', encoding="utf-8")
    assert list(documents(file, split="test")) == ["one", "two\u2028too"]
    assert texts.read_text(file) == "one\n\ntwo\u2028too"
    assert texts.read_text(file, enough=2) == "one"
    for lines, message in (('{"body": "two"}', "line 2 has no `text`"), ('{"text": 2}', "of line 2 is no text")):
        file.write_text('{"text": "one"}\n' + lines, encoding="utf-8")
        with pytest.raises(UsageError, match=message):
            texts.read_text(file)


def test_what_is_no_text(tmp_path: Path) -> None:
    """Nothing of this asks a network."""
    for name in ("none.txt", "org/none.txt", "./none", "/no/such", "wikitex", "org/name/more", "org/x.parquet", ""):
        with pytest.raises(UsageError, match="no such text file"):
            texts.read_text(name)
    empty, bytes_ = tmp_path / "empty.txt", tmp_path / "bytes.txt"
    empty.write_text(" \n", encoding="utf-8")
    bytes_.write_bytes(b"\xff\xfe\x00")
    for file, message in ((empty, "the text is empty"), (bytes_, "cannot be read as UTF-8")):
        with pytest.raises(UsageError, match=message):
            texts.read_text(file)


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "t.parquet").write_bytes(b"")
    for spec in ("org/name", str(tmp_path), tmp_path / "t.parquet"):
        with pytest.raises(UsageError, match=r"data ?sets") as caught:
            list(documents(spec, split="test"))
        assert caught.value.hint == "pip install 'bitfold[eval]'"


def test_local_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of parquet, a folder with splits, a folder with one, columns that are missing, damage."""
    pytest.importorskip("datasets", reason="datasets is not installed (pip install 'bitfold[eval]')")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    one, two, wrong = tmp_path / "one", tmp_path / "two", tmp_path / "wrong.parquet"
    for folder in (one, two):
        folder.mkdir()
        (folder / "train.parquet").write_bytes(parquet(text=["first", "second"]))
    (two / "test.parquet").write_bytes(parquet(text=["third"]))
    wrong.write_bytes(parquet(body=["first"]))
    assert list(documents(one / "train.parquet", split="test")) == ["first", "second"]
    assert list(documents(one, split="test")) == ["first", "second"]
    assert list(documents(two, split="test")) == ["third"]
    with pytest.raises(UsageError, match="no split 'dev'"):
        list(documents(two, split="dev"))
    with pytest.raises(CheckpointError, match="no text in a column `text`; it has body"):
        list(documents(wrong, split="test"))
    wrong.write_bytes(b"PAR1 no more")
    with pytest.raises(BitfoldError, match="cannot be read"):
        list(documents(wrong, split="test"))


def test_data_sets_of_a_hub(tmp_path: Path) -> None:
    """Through `datasets` itself, in a process of its own: it reads HF_ENDPOINT when it is imported."""
    pytest.importorskip("datasets", reason="datasets is not installed (pip install 'bitfold[eval]')")
    line = '{{"text": "{}"}}\n'.format
    with HubServer() as hub:
        hub.add_repo("org/plain", {"test.jsonl": (line("1") + line("2")).encode(), "train.jsonl": line("3").encode()})
        hub.add_repo("org/table", {"data/train-00000-of-00001.parquet": parquet(text=["4", "5"])})
        files = {name: line(name).encode() for name in ("a/test.jsonl", "b/valid.jsonl", "b/train.jsonl")}
        hub.add_repo("org/parts", {"README.md": CARD.encode(), **files})
        environment = {"HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1", "HF_HOME": str(tmp_path)}
        specs = ["org/plain", "org/plain::train", "org/table", "org/parts:a", "org/parts:b:valid"]
        specs += ["org/parts:b", "org/parts:c", "org/none"]
        done = subprocess.run(
            [sys.executable, "-c", ASK, *specs],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    said = {spec: rest for spec, *rest in (row.split("|") for row in done.stdout.splitlines())}
    assert [said[spec] for spec in specs[:5]] == [["1", "2"], ["3"], ["4", "5"], ["a/test.jsonl"], ["b/valid.jsonl"]]
    kind, what, hint = said["org/parts:b"]
    assert (kind, what) == ("UsageError", "the data set has no split 'test'")
    assert "valid" in hint
    assert [said[spec][0] for spec in specs[6:]] == ["HubError"] * 2
    assert "exist" in said["org/none"][1]
