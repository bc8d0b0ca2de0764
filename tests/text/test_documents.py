"""Documents: files, folders, and data sets of a Hub that speaks the protocol."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_lm
from bitfold.errors import UsageError
from bitfold.text import windows as texts
from bitfold.text.documents import text_pieces
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
from bitfold.text.documents import text_pieces
from bitfold.errors import BitfoldError
for spec in sys.argv[1:]:
    try:
        print(spec, "".join(text_pieces(spec, split="test", render=None)).replace("\\n\\n", "|"), sep="|")
    except BitfoldError as error:
        print(spec, type(error).__name__, error.what, error.hint, sep="|")
"""


def read(spec: str | Path, split: str = "test") -> str:
    """The whole text."""
    return "".join(text_pieces(spec, split=split, render=lambda *_: None))


def parquet(**columns: list[str]) -> bytes:
    """A file that pyarrow writes."""
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (pip install 'bitfold[eval]')")
    from pyarrow import parquet as files

    out = io.BytesIO()
    files.write_table(arrow.table(columns), out)
    return out.getvalue()


def test_lines_of_json(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": "one"}\n\n{"text": "two\u2028too", "id": 2}\r\n', encoding="utf-8")
    assert read(file) == "one\n\ntwo\u2028too"
    for lines, message in (
        ('{"other": "two"}', "line 2 has no text .* its columns: `other`"),
        ('{"text": 2}', "line 2 has no"),
    ):
        file.write_text('{"text": "one"}\n' + lines, encoding="utf-8")
        with pytest.raises(UsageError, match=message):
            read(file)


def test_what_is_no_text(tmp_path: Path) -> None:
    """Nothing of this asks a network."""
    for name in (
        "none.txt",
        "org/none.txt",
        "./none",
        "/no/such",
        "wikitex",
        "org/name/more",
        "org/x.parquet",
        "",
        "x" * 600,
    ):
        with pytest.raises(UsageError, match="no such text file"):
            read(name)
    with pytest.raises(UsageError, match="is an address"):
        read("https://example.org/a.txt")
    with pytest.raises(UsageError, match="no ordinary file"):
        read("/dev/null")
    empty = tmp_path / "empty.txt"
    for content in ("", " \n"):
        empty.write_text(content, encoding="utf-8")
        with pytest.raises(UsageError, match="the text is empty"):
            texts.read_lines(empty)
        with pytest.raises(UsageError, match="the text is empty"):
            texts.read_tokens(empty, tiny_lm.tokenizer(), enough=4)


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    for spec in ("org/name", str(tmp_path), tmp_path / "t.parquet"):
        with pytest.raises(UsageError, match=r"data ?sets|pyarrow") as caught:
            read(spec)
        assert caught.value.hint == "pip install 'bitfold[eval]'"


def test_parquet_and_arrow(tmp_path: Path) -> None:
    """By what is in them: the names say nothing."""
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (pip install 'bitfold[eval]')")
    file, table = tmp_path / "table.txt", arrow.table({"id": [1, 2], "text": ["first", "second"]})
    file.write_bytes(parquet(id=["1", "2"], text=["first", "second"]))
    assert read(file) == "first\n\nsecond"
    for opened in (arrow.ipc.new_file, arrow.ipc.new_stream):
        with opened(str(file), table.schema) as writer:
            writer.write_table(table)
        assert read(file) == "first\n\nsecond"
    file.write_bytes(parquet(other=["first"]))
    with pytest.raises(UsageError, match=r"row 1 has no text .* `other`"):
        read(file)
    file.write_bytes(b"PAR1 no more")
    with pytest.raises(UsageError, match="a parquet file that cannot be read"):
        read(file)


def test_local_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of parquet, a folder with splits, a folder with one."""
    pytest.importorskip("datasets", reason="datasets is not installed (pip install 'bitfold[eval]')")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "train.parquet").write_bytes(parquet(text=["first", "second"]))
    (two / "test.parquet").write_bytes(parquet(text=["third"]))
    assert read(one / "train.parquet") == "first\n\nsecond"
    assert read(one) == "first\n\nsecond"
    assert read(two) == "third"
    with pytest.raises(UsageError, match="no split 'dev'"):
        read(two, "dev")


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
