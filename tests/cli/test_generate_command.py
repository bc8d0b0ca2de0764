"""`bitfold generate` and `bitfold chat`."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch

import tiny_lm
from cli_runs import Bitfold, Run, keys_are_documented


def test_generate(bitfold: Bitfold, model: Path, quantized: Path) -> None:
    args = ("--max-new-tokens", 12, "--temperature", 1.0, "--seed", 5, "--json")
    first = bitfold("generate", quantized, "Line 1", *args).json
    keys_are_documented("generate", first)
    assert first["tokens"] <= 12
    same, other = (
        bitfold("generate", quantized, "--prompt", "Line 1", *args).json,
        bitfold(
            "generate", quantized, "Line 1", "--max-new-tokens", 12, "--temperature", 1.0, "--seed", 6, "--json"
        ).json,
    )
    assert same["text"] == first["text"] != other["text"]
    shown = bitfold("generate", quantized, "Line 1", *args[:-1])
    assert shown.out == "Line 1" + first["text"] + "\n"
    answer = bitfold("generate", model, "Hello", "--chat", "--max-new-tokens", 4)
    assert answer.code == 0
    assert not answer.out.startswith("Hello")


def test_an_error_before_the_first_word(bitfold: Bitfold, quantized: Path) -> None:
    """The prompt is not shown as if something were to follow."""
    failed = bitfold("generate", quantized, "Line " * 200)
    assert failed.code == 2
    assert failed.out == ""
    assert "more than the model can take" in failed.err


def test_generation_is_greedy_by_default(bitfold: Bitfold, model: Path) -> None:
    """The same as taking the most likely token by hand."""
    result = bitfold("generate", model, "Line 1", "--max-new-tokens", 6, "--json").json
    loaded, tokenizer = tiny_lm.model(), tiny_lm.tokenizer()
    ids = tokenizer("Line 1", return_tensors="pt")["input_ids"]
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, loaded(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert result["text"] == tokenizer.decode(ids[0, -6:], skip_special_tokens=True)


def test_chat(bitfold: Bitfold, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def talk(lines: str, *args: object) -> Run:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return bitfold("chat", model, "--max-new-tokens", 5, "--temperature", 0, *args)

    result = talk("Hi\n\nHi\n/reset\nHi\n/exit\nnever read\n", "--json")
    answers = [json.loads(line) for line in result.out.splitlines()]
    assert len(answers) == 3
    keys_are_documented("chat", answers)
    assert answers[1]["prompt_tokens"] > answers[0]["prompt_tokens"] == answers[2]["prompt_tokens"]
    assert answers[0]["text"] == answers[2]["text"]
    assert talk("Hi\n").out == answers[0]["text"] + "\n\n"
    full = talk("x" * 200 + "\n")
    assert full.code == 2
    assert "more than the model can take" in full.err


def test_chat_needs_a_template(bitfold: Bitfold, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_lm.folder(tmp_path / "plain", tiny_lm.model(), chat=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    result = bitfold("chat", plain)
    assert result.code == 2
    assert "no chat template" in result.err


def test_sampling_settings(bitfold: Bitfold, model: Path, tmp_path: Path) -> None:
    """Every option reaches the sampler."""
    plain = bitfold("generate", model, "Line 1", "--max-new-tokens", 30, "--json").json
    stop = plain["text"][4:6]
    stopped = bitfold("generate", model, "Line 1", "--max-new-tokens", 30, "--stop", "never", "--stop", stop)
    assert stopped.out == "Line 1" + plain["text"][: plain["text"].index(stop)] + "\n"
    assert plain["finish"] == "length"
    biased = bitfold("generate", model, "Line 1", "--max-new-tokens", 5, "--logit-bias", "64:1000", "--json").json
    assert biased["text"] == "aaaaa"
    alone = ("--temperature", 1.0, "--max-new-tokens", 30, "--json")
    for option in (("--top-k", 1), ("--min-p", 1.0), ("--typical-p", 0.001)):
        first, second = (bitfold("generate", model, "Line 1", *alone, *option, "--seed", n).json for n in (1, 2))
        assert first["text"] == second["text"]
    for option in ("--repetition-penalty", "--presence-penalty", "--frequency-penalty"):
        assert bitfold("generate", model, "Line 1", "--max-new-tokens", 30, option, 4.5, "--json").json != plain
    for speculate in ("off", "auto", "5"):
        same = bitfold("generate", model, "Line 1", "--max-new-tokens", 30, "--speculate", speculate, "--json").json
        assert same["text"] == plain["text"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--speculate", "maybe"), "auto, off, or 0 to 64"),
        (("--logit-bias", "a:b"), "TOKEN:BIAS"),
        (("--logit-bias", "7"), "TOKEN:BIAS"),
        (("--min-p", 2), "min_p"),
        (("--stop", ""), "stop"),
        (("--regex", "a", "--grammar", "b"), "one grammar"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(bitfold: Bitfold, model: Path, option: tuple[object, ...], message: str) -> None:
    result = bitfold("generate", model, "Line 1", *option)
    assert result.code == 2
    assert message in result.err


def test_grammars(bitfold: Bitfold, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    path = tmp_path / "file"
    path.write_text('{"type": "array", "items": {"enum": [1, 2]}, "minItems": 3, "maxItems": 3}')
    made = bitfold("generate", model, "Line 1", "--json-schema", path, "--json").json
    assert len(json.loads(made["text"])) == 3
    assert made["finish"] == "end"
    assert bitfold("generate", model, "Line 1", "--regex", "(yes|no)!", "--json").json["text"] in ("yes!", "no!")
    path.write_text('start: "yes" | "no"')
    assert bitfold("generate", model, "Line 1", "--grammar", path, "--json").json["text"] in ("yes", "no")
    path.write_text("start: foo")
    assert bitfold("generate", model, "Line 1", "--grammar", path).code == 2
    assert bitfold("generate", model, "Line 1", "--grammar", tmp_path / "missing").code == 3


def test_ctrl_c_ends_an_answer_of_chat(bitfold: Bitfold, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next message is answered, and the conversation holds what there was of the answer before."""
    from bitfold.cli import generate

    shown: list[str] = []

    def interrupted_once(text: str) -> None:
        shown.append(text)
        if len(shown) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(generate, "_show", interrupted_once)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nHi\n"))
    result = bitfold("chat", model, "--max-new-tokens", 9, "--temperature", 0)
    assert result.code == 0
    assert len(shown) > 3
