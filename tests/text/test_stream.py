"""Tokens in pieces are those of the whole text, and no more of a text is read than is needed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import tiny_lm
from bitfold.text import windows as texts
from bitfold.text.stream import sound_text, token_pieces

CORPUS = [tiny_lm.TEXT, "Hier ist ein längerer Satz, und 1234 Zahlen.\n\n\n  Eingerückt\tund \U0001f98a weiter. " * 9]


def trained(kind: str) -> Any:
    """A tokenizer of the kind, trained on a little text."""
    special: dict[str, Any] = {"vocab_size": 330, "show_progress": False}
    if kind == "words":
        raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(special_tokens=["[UNK]"], **special)
    elif kind == "unigram":
        raw = Tokenizer(models.Unigram())
        raw.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", special_tokens=["<unk>"], **special)
    elif kind == "no words":  # as Llama 2: spaces are letters, and one stands before the text
        raw = Tokenizer(models.BPE(unk_token="<unk>"))
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer = trainers.BpeTrainer(special_tokens=["<unk>"], **special)
    else:
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **special)
    raw.train_from_iterator(CORPUS, trainer)
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw)


KINDS = {kind: trained(kind) for kind in ("bytes", "words", "unigram", "no words")}


@pytest.mark.parametrize("kind", KINDS)
@given(
    st.lists(
        st.sampled_from(["fox", " jumps", "  ", "\n", "\n\n", "12", "é", "\U0001f98a", ".", "lazy dogs"]), max_size=300
    ),
    st.integers(90, 300),
    st.integers(1, 50),
)
@settings(max_examples=60, deadline=None)
def test_pieces_are_those_of_the_whole(kind: str, parts: list[str], piece: int, read: int) -> None:
    """Whatever the tokenizer does about words, spaces and the start of a text."""
    text, tokenizer = "".join(parts), KINDS[kind]
    blocks = [text[at : at + read] for at in range(0, len(text), read)]
    found = [token for ids in token_pieces(blocks, tokenizer, piece=piece, overlap=60) for token in ids]
    assert found == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_letters_without_end(kind: str) -> None:
    """Nothing to hold on to: no letter is lost or doubled, and the work ends."""
    tokenizer = KINDS[kind]
    found = [token for ids in token_pieces(["x" * 5000], tokenizer, piece=400, overlap=50) for token in ids]
    assert found or kind == "words"
    if kind == "bytes":
        assert tokenizer.decode(found) == "x" * 5000


class Slow:
    """A tokenizer that does not say where its tokens are."""

    is_fast = False

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def test_a_tokenizer_without_places() -> None:
    """Pieces end with lines."""
    pieces = list(token_pieces([tiny_lm.TEXT], Slow(), piece=100))
    assert [token for ids in pieces for token in ids] == [ord(c) for c in tiny_lm.TEXT]
    assert all(ids[-1] == 10 for ids in pieces)


def test_no_more_is_read_than_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of prose and of rows."""
    blocks = 0

    def endless(begin: str, row: str) -> Iterator[str]:
        nonlocal blocks
        yield begin
        while True:
            blocks += 1
            yield row

    for begin, row in (
        ("", tiny_lm.TEXT),
        ("", '{"text": "one two three"}\n' * 300),
        ("text,id\n", "one two,1\n" * 300),
    ):
        (tmp_path / "file").write_text(begin + row, encoding="utf-8")
        blocks = 0
        text = endless(begin, row)
        monkeypatch.setattr("bitfold.text.documents.characters", lambda _path, text=text: text)
        assert len(texts.read_tokens(tmp_path / "file", tiny_lm.tokenizer(), enough=64)) == 64
        assert blocks * len(row) < 2 << 20


def test_lone_surrogates() -> None:
    """Told once, and read as a character that is none; pairs become what they stand for."""
    assert sound_text("a\ud83e\udd8ab\ud800") == "a\U0001f98ab\ufffd"
    tokenizer = tiny_lm.tokenizer()
    with pytest.warns(UserWarning, match="lone surrogates"):
        found = texts.tokenize("a\ud800b", tokenizer)
    assert found.tolist() == tokenizer("a\ufffdb")["input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        texts.tokenize("sound \U0001f98a", tokenizer)


def test_digest_of_the_part_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file by its start and its size, a name by itself."""
    file = tmp_path / "text"
    file.write_text("abcdef", encoding="utf-8")
    first = texts.text_digest(str(file))
    monkeypatch.setattr(texts, "_DIGESTED", 4)
    assert texts.text_digest(str(file)) != first
    first = texts.text_digest(str(file))
    file.write_text("abcdxf", encoding="utf-8")
    assert texts.text_digest(str(file)) == first
    for changed in ("abxdef", "abcdefg"):
        file.write_text(changed, encoding="utf-8")
        assert texts.text_digest(str(file)) != first
    assert texts.text_digest("org/name") == "org/name"
