"""A tokenizer is read in one place, and whatever is wrong with it is said in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bitfold
import tiny_lm
from bitfold.errors import CheckpointError, UsageError
from bitfold.text.tokenizer import read_tokenizer, require_chat

Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm.folder(tmp_path_factory.mktemp("tokenizer") / "good", tiny_lm.model())


def without(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def rewritten(name: str, content: str | bytes) -> Change:
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def configured(**entries: Any) -> Change:
    def change(folder: Path) -> None:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))

    return change


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


OTHER_CODE = {"auto_map": {"AutoTokenizer": ["tokenization_foo.FooTokenizer", None]}, "tokenizer_class": "FooTokenizer"}
MERGE = '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}'
LLAMA = configured(tokenizer_class="LlamaTokenizer")
BROKEN: dict[str, tuple[Change, str]] = {
    "none": (without("tokenizer.json", "tokenizer_config.json"), "has no tokenizer"),
    "vocabulary missing": (without("tokenizer.json"), "has no tokenizer"),
    "cut short": (rewritten("tokenizer.json", '{"a":'), "cannot be read"),
    "empty": (rewritten("tokenizer.json", ""), "cannot be read"),
    "a list": (rewritten("tokenizer.json", "[]"), "cannot be read"),
    "no text": (rewritten("tokenizer.json", b"\xff\xfe\x00" * 9), "cannot be read"),
    "of another kind": (rewritten("tokenizer.json", '{"model": {"type": "Foo"}}'), "cannot be read"),
    "merge of no token": (rewritten("tokenizer.json", MERGE), "cannot be read"),
    "config cut short": (rewritten("tokenizer_config.json", "{"), "cannot be read"),
    "code of its own": (configured(**OTHER_CODE), "in code that is not run"),
    "SentencePiece alone": (
        both(without("tokenizer.json"), rewritten("tokenizer.model", b"\n"), LLAMA),
        "SentencePiece model alone",
    ),
    "a class without its vocabulary": (
        both(without("tokenizer.json"), LLAMA),
        "makes no tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_said_before_any_work(case: str, good: Path, tmp_path: Path):
    change, message = BROKEN[case]
    folder = shutil.copytree(good, tmp_path / "model")
    change(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tokenizer(folder)
    assert str(folder) in str(caught.value)
    assert caught.value.hint
    for dry_run in (True, False):
        with pytest.raises(CheckpointError, match=message):
            bitfold.quantize(folder, tmp_path / "out", bits=4, method="gptq", dry_run=dry_run)
    assert not list(tmp_path.glob("*out*"))
    with pytest.raises(CheckpointError, match=message):
        bitfold.evaluate(folder)


def test_without_a_tokenizer_the_default_is_a_method_that_needs_none(good: Path, tmp_path: Path):
    folder = shutil.copytree(good, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    report = bitfold.quantize(folder, tmp_path / "out", bits=4)
    assert "without calibration: has no tokenizer" in report.method


def test_code_beside_the_model_is_never_run(good: Path, tmp_path: Path):
    folder = shutil.copytree(good, tmp_path / "model")
    configured(**OTHER_CODE)(folder)
    (folder / "tokenization_foo.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass FooTokenizer: pass\n")
    with pytest.raises(CheckpointError, match="in code that is not run"):
        read_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


def test_a_chat_template_is_tried():
    tokenizer = tiny_lm.tokenizer()
    require_chat(tokenizer, "m")
    for template, message in (("{% for m in messages %}", "unexpected end|Unexpected end"), ("{{ 1 / 0 }}", "zero")):
        tokenizer.chat_template = template
        with pytest.raises(CheckpointError, match=f"chat template cannot be used: .*({message})"):
            require_chat(tokenizer, "m")
    with pytest.raises(UsageError, match="no chat template"):
        require_chat(tiny_lm.tokenizer(chat=False), "m")
