"""Texts under a grammar are its sentences, whatever the model would rather say."""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path
from typing import Any

import pytest

import tiny_lm
from bitfold.engine import Grammar, Sampling, Writer
from bitfold.errors import CheckpointError, UsageError

LLGUIDANCE = pytest.importorskip("llguidance", reason="llguidance is not installed")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["fox", "dog"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Writer:
    folder = tiny_lm.folder(tmp_path_factory.mktemp("grammar") / "model", tiny_lm.model())
    return Writer.open(folder, dtype="float32")


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_json_schema(writer, native, seed):
    writer.native = native
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    made = writer.write("Line", Sampling(100, temperature=1.0, seed=seed, grammar=grammar))
    found = json.loads(made.text)
    assert made.finish == "end"
    assert found["name"] in ("fox", "dog")
    assert 0 <= found["age"] <= 99
    assert not re.search(r"\s{30}", made.text)


@pytest.mark.parametrize("guesses", [0, 4])
@pytest.mark.parametrize(
    ("kind", "text", "pattern"),
    [
        ("regex", r"(ab|cd){6}x", r"(ab|cd){6}x"),
        ("grammar", 'start: "yes" | "no" " sir"', r"yes|no sir"),
        ("grammar", 'root ::= item{2}\nitem ::= "[" [a-z] "]"', r"(\[[a-z]\]){2}"),
        ("regex", "déjà(你|🦊)", "déjà(你|🦊)"),
    ],
)
def test_grammars(writer, kind, text, pattern, guesses):
    writer.native, writer.guesses, writer._loop = True, guesses, None
    for temperature in (0.0, 1.5):
        made = writer.write("abababab", Sampling(60, temperature=temperature, grammar=Grammar(kind, text)))
        assert re.fullmatch(pattern, made.text)
        assert made.finish == "end"


def test_a_text_that_is_cut_is_a_beginning(writer):
    made = writer.write("a", Sampling(5, grammar=Grammar("regex", "a{20}")))
    assert (made.text, made.finish) == ("aaaaa", "length")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "(ab"),
        ("grammar", "start: foo"),
        ("grammar", ""),
        ("json_schema", "{"),
        ("json_schema", '{"type": "nonsense"}'),
        ("json_schema", '{"$ref": "https://example.org/schema"}'),
        ("json_schema", "[1]"),
        ("json_schema", "[" * 100000),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_grammar(kind, text):
    with pytest.raises(UsageError):
        Grammar(kind, text)


def test_out_of_a_file(tmp_path: Path):
    path = tmp_path / "schema.json"
    with pytest.raises(CheckpointError, match="cannot be read"):
        Grammar.read("json_schema", path)
    path.write_text(json.dumps(SCHEMA))
    assert Grammar.read("json_schema", path).text == path.read_text()


def test_without_llguidance(monkeypatch):
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("llguidance"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match="pip install"):
        Grammar("regex", "a")
