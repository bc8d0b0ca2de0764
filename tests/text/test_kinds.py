"""What a file is, is judged by what is in it: data as data, prose as prose, and neither by its name."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

import tiny_lm
from bitfold.errors import UsageError
from bitfold.text import kinds
from bitfold.text import windows as texts
from bitfold.text.chat import Renderer
from bitfold.text.documents import text_pieces
from bitfold.text.start import start_name, text_start

WORDS = ["One, two and three.", 'A "quoted" word,\nand a second line', "Déjà vu; the end."]
TEXT = "\n\n".join(WORDS)
ROWS = [{"id": i, "text": word} for i, word in enumerate(WORDS)]
TURNS = [{"role": "user", "content": "What is a fox?"}, {"role": "assistant", "content": "An animal."}]
CHAT = "<user>What is a fox?<assistant>An animal."
SHARED = [{"from": "human", "value": "What is a fox?"}, {"from": "gpt", "value": "An animal."}]


def lines(*rows: Any) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def table(delimiter: str, rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def read(tmp_path: Path, content: str | bytes, name: str = "file", tokenizer: Any = None) -> str:
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    made = tiny_lm.tokenizer() if tokenizer is None else tokenizer
    start = start_name(text_start(made), made) or ""
    return "".join(text_pieces(file, split="train", render=Renderer(made, start)))


DATA = {
    "lines": lines(*ROWS),
    "lines with empty ones between": "\n\n" + lines(*ROWS).replace("\n", "\r\n\r\n") + "\n",
    "a list": json.dumps(ROWS),
    "a list, indented": json.dumps(ROWS, indent=2),
    "objects, indented, one after the other": "\n".join(json.dumps(row, indent=4) for row in ROWS),
    "a list of texts a line": lines(WORDS[:1], WORDS[1:]),
    "a list of texts": json.dumps(WORDS, indent=1),
    "an object with a list": json.dumps({"version": "1.1", "data": ROWS}),
    "an object with a list for each split": json.dumps({"test": ROWS[:1], "train": ROWS}),
    "columns": json.dumps({"id": [0, 1, 2], "text": WORDS}),
    "columns of pandas": json.dumps({"id": {"0": 0, "1": 1, "2": 2}, "text": dict(zip("012", WORDS, strict=True))}),
    "pandas, split": json.dumps(
        {"columns": ["id", "text"], "index": [0, 1, 2], "data": [[i, w] for i, w in enumerate(WORDS)]}
    ),
    "rows by number": json.dumps({str(row["id"]): row for row in ROWS}),
    "another name": lines(*({"content": word, "url": "x"} for word in WORDS)),
    "no text in some": lines(ROWS[0], {"id": 5, "text": None}, *ROWS[1:], {"id": 6, "text": ""}),
    "CSV": table(",", ROWS),
    "TSV": table("\t", ROWS),
    "semicolons": table(";", ROWS),
    "CSV of one column": table(",", [{"text": word} for word in WORDS]),
    "CSV with an index": table(",", [{"": i, "Text": word} for i, word in enumerate(WORDS)]),
}
CHATS = {
    "messages": lines({"messages": TURNS}),
    "conversations": lines({"id": "x", "conversations": SHARED}),
    "with a system": lines({"system": "", "conversations": SHARED}),
    "a list of conversations": json.dumps([TURNS]),
    "a list of rows": json.dumps([{"messages": TURNS}], indent=1),
    "one object": json.dumps({"messages": TURNS}),
    "one conversation": json.dumps(TURNS, indent=2),
    "a message a line": lines(*TURNS),
    "lists for each key": lines(
        {"conversations": {"from": ["human", "gpt"], "value": ["What is a fox?", "An animal."]}}
    ),
    "parts": lines(
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is a fox?"}]},
                TURNS[1],
            ]
        }
    ),
    "JSON in a column": table(",", [{"id": i, "messages": json.dumps(TURNS)} for i in range(1)]),
    "turns as texts": lines({"dialog": ["What is a fox?", "An animal."]}),
    "prompt and completion": lines({"prompt": "What is a fox?", "completion": "An animal."}),
    "prompt and completion in messages": lines({"prompt": TURNS[:1], "completion": TURNS[1:]}),
    "instruction and output": lines({"instruction": "What is a fox?", "input": "", "output": "An animal."}),
    "question and answer": table("\t", [{"question": "What is a fox?", "answer": "An animal."}]),
    "chosen and rejected": lines({"chosen": TURNS, "rejected": SHARED}),
    "text beside messages": lines({"text": "other", "messages": TURNS}),
}
PROSE = {
    "a brace": "{Chorus}\nLa la la\n{Verse}\nLa",
    "a bracket": "[1] Smith, J. (1999). On foxes.\n[2] Miller, A. (2001). On dogs.\n",
    "a bracket and a comma": "[Intro], [Verse], [Chorus]\nThey sing.",
    "a number in brackets": "[1]\n\nFirst chapter.",
    "citations": "[1, 2] Foxes.\n[3] Dogs.\n",
    "an empty list": "[]\nis an empty list.",
    "an object, then words": '{"a": 1}\n\nis an object. It has one key.\nAnd that is all.\nReally.\n',
    "commas": "Roses are red, violets are blue,\nsugar is sweet, and so are you,\nthe fox is quick, the dog is too,\n",
    "one comma a line": "Roses are red, violets are blue\nSugar is sweet, so are you\nFoxes are quick, dogs are too\n",
    "one line": "Hello, world",
    "quoted lines": '"Who is there?"\n"A fox."\n"Come in."\n',
    "code": "#include <stdio.h>\n\nint main(void) {\n\treturn 0;\n}\n",
    "markdown": "| a | b |\n|---|---|\n| 1 | 2 |\n",
    "less than": "<3 is a heart.\nIt is.",
    "GGUF": "GGUF is a file format, and RIFF another.",
    "python": "x = {'a': 1}\nfor k in x:\n    print(k, x[k])\n",
    "a long line": "word " * 100_000,
}
REFUSED = {
    "columns without a text": (lines({"id": 1, "label": "x"}), "line 1 has no text .* `id`, `label`"),
    "a config": (json.dumps({"architectures": ["X"], "vocab_size": 3}, indent=1), "`architectures`, `vocab_size`"),
    "a table without a text": ("id,label,x\n1,b,2\n2,c,3\n3,d,4\n", "`id`, `label`, `x`"),
    "a table of numbers": ("1,2,3\n4,5,6\n7,8,9\n", "no text that is known by its name"),
    "a short row": ("id,text\n1,a\n2\n", "line 3 has 1 fields, the header 2"),
    "an open quote": ('id,text\n1,"a\n2,b\n', "line 3 is no row of a table"),
    "a damaged line": (lines(*ROWS) + '\n{"text": "cut o', "line 4 is not JSON"),
    "a damaged line between": (lines(ROWS[0]) + "\n{text}\n" + lines(*ROWS), "line 2 is not JSON"),
    "a damaged line at the start": ("oh\n" + lines(*ROWS), "line 1 is not JSON"),
    "a list that is cut off": (json.dumps(ROWS)[:-9], "is not JSON"),
    "an object that is cut off": (json.dumps({"data": ROWS}, indent=1)[:-20], "is not JSON"),
    "dictionaries of Python": ("\n".join(map(str, ROWS[:2])), "dictionaries, but not in JSON"),
    "a table of numbers that repeat": ("0,0,a\n1,1,a\n2,4,a\n", "no text that is known by its name"),
    "numbers": ("[1, 2, 3]", "item 1 is a number"),
    "many numbers": (json.dumps(list(range(300_000))), "item 1 is a number"),
    "a list of numbers a line": ("[1, 2]\n[3, 4]\n[5, 6]\n", "item 1 is a number"),
    "lists of numbers": ("[[1, 2], [3, 4]]", "item 1 is a list"),
    "nesting": ("[" * 100_000, "too deep"),
    "a page": ("<!DOCTYPE html>\n<html><body>Hello</body></html>", "HTML or XML"),
    "a feed": ('<?xml version="1.0"?><a>Hello</a>', "HTML or XML"),
    "elements": ("<doc>\n<p>Hello</p>\n</doc>\n", "HTML or XML"),
    "a PDF": (b"%PDF-1.7\n%\xe2\xe3", "it is a PDF document"),
    "a zip": (b"PK\x03\x04\x14\x00", "it is a zip archive"),
    "a picture": (b"\x89PNG\r\n\x1a\n\x00", "it is a picture"),
    "a GGUF file": (b"GGUF\x03\x00\x00\x00", "it is a GGUF checkpoint"),
    "safetensors": (b'\x10\x00\x00\x00\x00\x00\x00\x00{"a": 1}', "it is a safetensors checkpoint"),
    "a NUL": (b"some text\x00 and more", "a NUL at byte 9"),
    "Latin-1": ("Caf\xe9 au lait".encode("latin-1"), "is no UTF-8 text: byte 3 is 0xe9"),
    "surrogates as bytes": (b"a \xed\xa0\x80 b", "is no UTF-8 text: byte 2 is 0xed"),
    "a character cut off": ("d\xe9".encode()[:-1], "is no UTF-8 text"),
    "half of UTF-16": ("text".encode("utf-16")[:-1], "is no UTF-16 text"),
    "damaged gzip": (gzip.compress(TEXT.encode())[:-12], "cannot be read"),
    "roles that the template refuses": (
        lines({"messages": [TURNS[1], TURNS[1]]}),
        "the chat template refuses .* line 1",
    ),
}
MARKED = {
    name: ("\ufeff" + TEXT).encode(name) for name in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
}
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}" + tiny_lm.CHAT


@pytest.mark.parametrize("suffix", ["", ".txt", ".json", ".csv"])
@pytest.mark.parametrize("name", DATA)
def test_data(tmp_path: Path, name: str, suffix: str) -> None:
    """The texts of the rows, whatever holds them."""
    assert read(tmp_path, DATA[name], "file" + suffix) == TEXT.replace("\n", "\n")


@pytest.mark.parametrize("name", CHATS)
def test_conversations(tmp_path: Path, name: str) -> None:
    """Through the template of the model; those that are more than prompt and answer need one."""
    assert read(tmp_path, CHATS[name]) == CHAT
    bare = tiny_lm.tokenizer(chat=False)
    if "and" in name and "chosen" not in name and "messages" not in name:
        assert read(tmp_path, CHATS[name], tokenizer=bare) == "What is a fox?\nAn animal."
    elif name != "text beside messages":
        with pytest.raises(UsageError, match=r"`messages` or `conversations`.*has no chat template"):
            read(tmp_path, CHATS[name], tokenizer=bare)


@pytest.mark.parametrize("suffix", ["", ".json", ".csv"])
@pytest.mark.parametrize("name", PROSE)
def test_prose(tmp_path: Path, name: str, suffix: str) -> None:
    """Stays what it is."""
    assert read(tmp_path, PROSE[name], "file" + suffix) == PROSE[name]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path: Path, name: str) -> None:
    """By name, with what was found."""
    content, message = REFUSED[name]
    made = tiny_lm.tokenizer()
    made.chat_template = STRICT
    with pytest.raises(UsageError, match=message):
        read(tmp_path, content, tokenizer=made)


@pytest.mark.parametrize("packed", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed(tmp_path: Path, packed: Any) -> None:
    assert read(tmp_path, packed(TEXT.encode())) == TEXT
    assert read(tmp_path, packed(DATA["lines"].encode())) == TEXT


@pytest.mark.parametrize("encoding", MARKED)
def test_byte_order_marks(tmp_path: Path, encoding: str) -> None:
    assert read(tmp_path, MARKED[encoding]) == TEXT
    assert read(tmp_path, ("\ufeff" + DATA["CSV"]).encode(encoding)) == TEXT


@pytest.mark.parametrize("name", DATA)
def test_pieces_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Rows, fields and characters across the border of two blocks, and files that are longer than is looked at."""
    monkeypatch.setattr("bitfold.text.encodings.BLOCK", 7)
    monkeypatch.setattr("bitfold.text.documents.WINDOW", len(DATA[name]) * 3 // 4)
    assert read(tmp_path, DATA[name]) == TEXT


def test_a_system_that_the_template_does_not_know(tmp_path: Path) -> None:
    """It is told with the first message."""
    made = tiny_lm.tokenizer()
    made.chat_template = STRICT
    content = lines({"messages": [{"role": "system", "content": "Be brief."}, *TURNS]})
    assert read(tmp_path, content, tokenizer=made) == CHAT.replace("What", "Be brief.\n\nWhat")


def test_the_start_that_a_template_writes_is_left_to_the_windows(tmp_path: Path) -> None:
    """It does not stand within them; and tokens come from the template's special ones, once."""
    raw = tiny_lm.tokenizer().backend_tokenizer
    raw.add_special_tokens(["<s>"])
    raw.post_processor = hf.tokenization_utils_tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 257)]
    )
    made = hf.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="<end>", pad_token="<end>")
    made.chat_template = "<s>" + tiny_lm.CHAT + "<end>"
    assert read(tmp_path, lines(*[{"messages": TURNS}] * 2), tokenizer=made) == (CHAT + "<end>") * 2
    ids = texts.read_tokens(tmp_path / "file", made, enough=None)
    assert (ids == 256).sum() == 2
    assert not (ids == 257).any()


def test_the_window_is_wide_enough() -> None:
    assert kinds.WINDOW >= 1 << 20


@pytest.mark.parametrize("content", ["[]", " [ ]\n", "\ufeff[\n]\n"])
def test_a_list_of_nothing(tmp_path: Path, content: str) -> None:
    """Data without rows: no text, and no text of brackets."""
    assert kinds.kind_of(content.lstrip("\ufeff"), whole=True, where="file") is kinds.JSON
    assert read(tmp_path, content) == ""
