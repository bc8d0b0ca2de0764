"""Columns that are named, tools of a conversation, YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_lm
from bitfold.errors import UsageError
from bitfold.text.chat import Renderer
from bitfold.text.documents import text_pieces, with_column
from bitfold.text.windows import text_digest

WORDS = ["One, two and three.", "Déjà vu; the end."]
TEXT = "\n\n".join(WORDS)
TURNS = [{"role": "user", "content": "What is a fox?"}, {"role": "assistant", "content": "An animal."}]
CHAT = "<user>What is a fox?<assistant>An animal."


def read(tmp_path: Path, content: str, column: str = "", tokenizer: Any = None) -> str:
    (tmp_path / "file").write_text(content, encoding="utf-8")
    spec = f"{tmp_path / 'file'}{column and '#'}{column}"
    return "".join(text_pieces(spec, split="train", render=Renderer(tokenizer or tiny_lm.tokenizer(), "")))


def rows(**more: Any) -> list[dict[str, Any]]:
    return [{"text": "not this", "my story": word, **more} for word in WORDS]


LAYOUTS = {
    "lines": "\n".join(map(json.dumps, rows())),
    "a list": json.dumps(rows(), indent=1),
    "columns": json.dumps({"my story": WORDS, "text": ["no", "no"]}),
    "a table": 'text,my story\nnot this,"One, two and three."\nno,Déjà vu; the end.\n',
    "a table of one column": '"my story"\n"One, two and three."\n"Déjà vu; the end."\n',
    "messages by another name": json.dumps([{"role": "user", "content": "x", "my story": word} for word in WORDS]),
    "yaml": "- text: no\n  my story: One, two and three.\n- text: no\n  my story: Déjà vu; the end.\n",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_column_that_is_named(layout: str, tmp_path: Path) -> None:
    assert read(tmp_path, LAYOUTS[layout], "my story") == TEXT


def test_a_column_of_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows()), tmp_path / "file.parquet")
    pieces = text_pieces(f"{tmp_path / 'file.parquet'}#my story", split="train", render=Renderer(None, ""))
    assert "".join(pieces) == TEXT


def test_columns_of_messages_and_lists(tmp_path: Path) -> None:
    assert read(tmp_path, json.dumps({"talk": TURNS, "text": "no"}), "talk") == CHAT
    assert read(tmp_path, json.dumps({"parts": WORDS, "text": "no"}), "parts") == "\n".join(WORDS)


@pytest.mark.parametrize("content", ["A text, and no data.\nOf two lines.", json.dumps(rows()), "a,b\n1,2\n"])
def test_no_such_column(content: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="column"):
        read(tmp_path, content, "nothing")


def test_names_of_columns(tmp_path: Path) -> None:
    """A file may have a # in its name; the digest of a run changes with the column."""
    (tmp_path / "a#b").write_text("A text.")
    assert "".join(text_pieces(tmp_path / "a#b", split="train", render=Renderer(None, ""))) == "A text."
    assert with_column("rows.csv", "story") == "rows.csv#story"
    assert with_column(None, None) is None
    for spec in (None, "default", "self", "a text\nof two lines"):
        with pytest.raises(UsageError, match="a column of what"):
            with_column(spec, "story")
    digests = {text_digest(f"{tmp_path / 'a#b'}{column}") for column in ("", "#x", "#y")}
    assert len(digests) == 3


YAML = {
    "a conversation": "- role: user\n  content: What is a fox?\n- role: assistant\n  content: An animal.\n",
    "messages": "messages:\n  - role: user\n    content: What is a fox?\n  - {role: assistant, content: An animal.}\n",
    "a list of rows": "# talks\n- messages:\n  - role: user\n    content: What is a fox?\n"
    "  - role: assistant\n    content: |-\n      An animal.\n",
    "documents": "---\nid: 1\nmessages:\n- role: user\n  content: What is a fox?\n"
    "- role: assistant\n  content: An animal.\n...\n",
    "ShareGPT": "- id: x\n  conversations:\n  - from: human\n    value: What is a fox?\n"
    '  - from: gpt\n    "value": An animal.\n',
    "keys in quotes": '- "role": user\n  "content": What is a fox?\n- "role": assistant\n  "content": An animal.\n',
}


@pytest.mark.parametrize("name", YAML)
def test_yaml(name: str, tmp_path: Path) -> None:
    assert read(tmp_path, YAML[name]) == CHAT


def test_values_of_yaml_stay_as_they_are_written(tmp_path: Path) -> None:
    content = "- text: 2026-01-01\n  n: 1\n- text: no\n  n: 2\n- text: 1.50\n  n: 3\n"
    assert read(tmp_path, content) == "2026-01-01\n\nno\n\n1.50"


def test_damaged_yaml(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="line 5 is not YAML"):
        read(tmp_path, "- role: user\n  content: x\n- role: user\n  content: [x\n- role: user\n  content: y\n")


PROSE = [
    "Notes:\n- text: see below\nAnd this is prose.\n",
    "- role: the part of an actor\n- content: what is in it\n",
    "From: me\nTo: you\n\nHello.\n",
    "Dear all:\n  - content: none\nBye.\n",
]


@pytest.mark.parametrize("content", PROSE)
def test_prose_that_looks_like_it(content: str, tmp_path: Path) -> None:
    assert read(tmp_path, content) == content


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
TEMPLATE = (
    "{% if tools %}[{% for t in tools %}{{ t['function']['name'] }}{% endfor %}]{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% for c in m.get('tool_calls') or [] %}"
    "{{ c['function']['name'] }}({% for k, v in c['function']['arguments'].items() %}{{ k }}={{ v }}{% endfor %})"
    "{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("written", [lambda value: value, json.dumps], ids=["objects", "JSON in a text"])
def test_tools_and_their_calls(written: Any, tmp_path: Path) -> None:
    """As OpenAI's API has them, with arguments in JSON, or as chat templates want them."""
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": written({"where": "Rome"})}}
    messages = [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    tokenizer = tiny_lm.tokenizer()
    tokenizer.chat_template = TEMPLATE
    found = read(tmp_path, json.dumps({"messages": messages, "tools": written(TOOLS)}), tokenizer=tokenizer)
    assert found == "[look]<user>What is a fox?<assistant>look(where=Rome)"
