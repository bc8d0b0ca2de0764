"""Which tokens of conversations are the assistant's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_lm
from bitfold.errors import UsageError
from bitfold.text.answers import answer_tokens, told_apart
from bitfold.text.tokens import calibration_tokens

ASKED = {"role": "user", "content": "two and two?"}
SAID = {"role": "assistant", "content": "Four."}
MORE = [{"role": "user", "content": "déjà vu?"}, {"role": "assistant", "content": "Oui — déjà."}]
CLOSED = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def written(folder: Path, *rows: Any) -> str:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(file)


def parts(text: str, tokenizer: Any) -> tuple[str, str]:
    """All of it, and what counts."""
    ids, said = told_apart(answer_tokens(text, tokenizer, enough=None))
    return tokenizer.decode(ids), tokenizer.decode(ids[said])


def test_turns_of_the_assistant_count_with_what_ends_them(tmp_path: Path) -> None:
    tokenizer = tiny_lm.tokenizer()
    tokenizer.chat_template = CLOSED
    text = written(tmp_path, {"messages": [ASKED, SAID, *MORE]}, {"messages": [ASKED, SAID]})
    whole, said = parts(text, tokenizer)
    assert whole.startswith("[user]two and two?[/][assistant]Four.[/][user]déjà vu?[/][assistant]Oui")
    assert said == "Four.[/]Oui — déjà.[/]Four.[/]"


def test_pairs_without_a_template(tmp_path: Path) -> None:
    text = written(tmp_path, {"prompt": "a?", "completion": " b"}, {"prompt": "c?", "completion": "d"})
    assert parts(text, tiny_lm.tokenizer(chat=False)) == ("a? bc?\nd", " bd")


def test_a_template_without_a_system_role(tmp_path: Path) -> None:
    tokenizer = tiny_lm.tokenizer()
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refuse + CLOSED
    text = written(tmp_path, {"messages": [{"role": "system", "content": "Be brief."}, ASKED, SAID]})
    assert parts(text, tokenizer) == ("[user]Be brief.\n\ntwo and two?[/][assistant]Four.[/]", "Four.[/]")


def test_the_dialogue_that_comes_with_bitfold(tmp_path: Path) -> None:
    whole, said = parts("dialogue", tiny_lm.tokenizer())
    assert "What's the difference between weather" in whole
    assert said.startswith("Weather is what the air is doing")
    assert "What's the difference between weather" not in said


def test_windows_of_a_mix_keep_the_marks(tmp_path: Path) -> None:
    tiny_lm.tokenizer().save_pretrained(tmp_path)
    spec = f"{written(tmp_path, *[{'messages': [ASKED, SAID]}] * 20)} + dialogue"
    ids = calibration_tokens(tmp_path, spec, nsamples=8, seqlen=40, answers_only=True)
    plain, said = told_apart(ids)
    assert plain.min() >= 0
    assert 0 < int(said.sum()) < said.numel()
    assert torch.equal(plain, calibration_tokens(tmp_path, spec, nsamples=8, seqlen=40))


def test_what_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_lm.tokenizer()
    with pytest.raises(UsageError, match="holds text that is no conversation"):
        answer_tokens(written(tmp_path, {"text": "a fox"}), tokenizer, enough=None)
    tokenizer.chat_template = "{{ messages | length }}" + CLOSED  # otherwise, as soon as there is more
    with pytest.raises(UsageError, match="otherwise when others follow"):
        answer_tokens(written(tmp_path, {"messages": [ASKED, SAID, *MORE]}), tokenizer, enough=None)
