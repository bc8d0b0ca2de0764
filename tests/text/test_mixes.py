"""Mixes of texts: what is read of each, in which order, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_lm
from bitfold.errors import UsageError
from bitfold.text.documents import with_column
from bitfold.text.mixes import Part, joined, parts_of, shares
from bitfold.text.tokens import calibration_tokens
from bitfold.text.windows import text_digest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes, and two texts that have no letter in common."""
    work = tmp_path_factory.mktemp("mixes")
    tiny_lm.tokenizer().save_pretrained(work)
    (work / "a.txt").write_text("a" * 2000, encoding="utf-8")
    (work / "b.txt").write_text("b" * 2000, encoding="utf-8")
    return work


def test_what_a_mix_says(folder: Path) -> None:
    assert parts_of("default") == [Part("default")]
    assert parts_of("default:0.5") == [Part("default", 0.5)]
    assert parts_of("org/name:en:train") == [Part("org/name:en:train")]
    assert parts_of("org/name:en:train:2 + code") == [Part("org/name:en:train", 2.0), Part("code")]
    assert parts_of("a line\n + another") == [Part("a line\n + another")]
    odd = folder / "x + y.txt:2"
    odd.write_text("c" * 100, encoding="utf-8")
    assert parts_of(str(odd)) == [Part(str(odd))]
    assert joined(["a:1", "b"]) == "a:1 + b"
    assert joined([]) is joined(None) is None


@pytest.mark.parametrize(
    "wrong", ["default:0 + code", "default:-1", "default:inf", "default + self", "default +  + code"]
)
def test_what_is_refused(wrong: str) -> None:
    with pytest.raises(UsageError):
        parts_of(wrong)


def test_shares_add_up() -> None:
    assert shares([Part("a", 0.5), Part("b", 0.3), Part("c", 0.2)], 10) == [5, 3, 2]
    assert shares([Part("a"), Part("b"), Part("c")], 32) == [11, 11, 10]
    assert shares([Part("a", 100.0), Part("b")], 4) == [3, 1] or sum(shares([Part("a", 100.0), Part("b")], 4)) >= 4


def test_windows_of_all_spread_evenly(folder: Path) -> None:
    """Three quarters of one, a quarter of the other, among the last ones as well."""
    spec = f"{folder / 'a.txt'}:0.75 + {folder / 'b.txt'}:0.25"
    ids = calibration_tokens(folder, spec, nsamples=16, seqlen=20)
    kinds = [int(window[0]) for window in ids]
    assert all(len(set(window.tolist())) == 1 for window in ids)
    a, b = (int(calibration_tokens(folder, str(folder / n), nsamples=1, seqlen=8)[0, 0]) for n in ("a.txt", "b.txt"))
    assert (kinds.count(a), kinds.count(b)) == (12, 4)
    assert all(kinds[i : i + 4].count(b) == 1 for i in range(0, 16, 4))
    ids = calibration_tokens(folder, spec, nsamples=10_000, seqlen=20)
    assert len(ids) == 133  # all 100 windows of the first, and a third as many of the second
    single = calibration_tokens(folder, f"{folder / 'a.txt'}:0.3", nsamples=4, seqlen=20)
    assert torch.equal(single, calibration_tokens(folder, str(folder / "a.txt"), nsamples=4, seqlen=20))


def test_code_is_there(folder: Path) -> None:
    ids = calibration_tokens(folder, "code", nsamples=4, seqlen=64)
    text = tiny_lm.tokenizer().decode(ids[0])
    assert text.startswith("# bitfold/__init__.py")


def test_dialogue_is_there_in_the_chat_template_or_without(folder: Path, tmp_path: Path) -> None:
    tokenizer = tiny_lm.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    (tmp_path / "chat").mkdir()
    tokenizer.save_pretrained(tmp_path / "chat")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    given = {"nsamples": 4, "seqlen": 256, "start_token": False}
    chat, plain = (
        tokenizer.decode(calibration_tokens(where, "dialogue", **given).flatten())
        for where in (tmp_path / "chat", tmp_path)
    )
    assert chat.startswith("<system>You are a helpful assistant.</><user>What's the difference")
    assert plain.startswith("System: You are a helpful assistant.\n\nUser: What's the difference")
    ids = calibration_tokens(folder, "default + code + dialogue", nsamples=9, seqlen=64)
    assert ids.shape == (9, 64)
    with pytest.raises(UsageError) as it:
        calibration_tokens(folder, "text", nsamples=1, seqlen=8)
    assert "default, code, dialogue" in (it.value.hint or "")


def test_its_digest_changes_with_every_text(folder: Path) -> None:
    spec = f"{folder / 'a.txt'} + {folder / 'b.txt'}:2"
    before = text_digest(spec)
    assert before != text_digest(f"{folder / 'a.txt'} + {folder / 'b.txt'}")
    (folder / "b.txt").write_text("d" * 2000, encoding="utf-8")
    assert text_digest(spec) != before


def test_columns_are_named_within(folder: Path) -> None:
    with pytest.raises(UsageError, match="of which text"):
        with_column("a.csv + b.csv", "story")
