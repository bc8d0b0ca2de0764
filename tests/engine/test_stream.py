"""Text is shown as soon as it is certain, and never a part of what ends it."""

from __future__ import annotations

import pytest

import tiny_lm
from bitfold.engine.stream import TextStream

TEXT = "déjà vu — 你好\n    if x:\n\t日本語 🦊!" * 5


def pieces(stream: TextStream, text: str) -> list[str]:
    given = []
    for token in tiny_lm.tokenizer()(text)["input_ids"]:
        given.append(stream.add(token))
        if stream.stopped:
            break
    given.append(stream.finish())
    assert "".join(given) == stream.text
    return given


def test_whole_characters_as_they_come():
    """The tokenizer cuts bytes: every character appears with its last byte."""
    stream = TextStream(tiny_lm.tokenizer())
    given = pieces(stream, TEXT)
    assert stream.text == TEXT
    assert [piece for piece in given if piece] == list(TEXT)


def test_half_a_character_at_the_end():
    stream = TextStream(tiny_lm.tokenizer())
    ids = tiny_lm.tokenizer()("aé")["input_ids"]
    assert [stream.add(i) for i in ids[:-1]] == ["a", ""]
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["fox"], "the quick brown "),
        (["fox", "quick"], "the "),
        (["k b", "quick brown"], "the quic"),
        (["b", "brown fox"], "the quick "),
        (["never"], "the quick brown fox"),
        (["foxes", "fox!"], "the quick brown fox"),
        (["the"], ""),
        (["x"], "the quick brown fo"),
    ],
    ids=str,
)
def test_stops(stops, expected):
    stream = TextStream(tiny_lm.tokenizer(), stops)
    pieces(stream, "the quick brown fox")
    assert stream.text == expected
    assert stream.stopped == (expected != "the quick brown fox")


def test_the_beginning_of_a_stop_text_waits_until_it_is_none():
    stream = TextStream(tiny_lm.tokenizer(), ["aab"])
    assert pieces(stream, "aaac") == ["", "", "a", "aac", ""]
    stream = TextStream(tiny_lm.tokenizer(), ["aab"])
    assert pieces(stream, "aaab") == ["", "", "a", "", ""]


def test_special_tokens_give_no_text():
    stream = TextStream(tiny_lm.tokenizer())
    assert stream.add(256) == ""
    assert stream.finish() == ""
