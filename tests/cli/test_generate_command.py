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
