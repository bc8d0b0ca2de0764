"""`bitfold finetune` and `bitfold merge` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny_lm
from bitfold import quantize
from cli_runs import Bitfold, keys_are_documented

pytest.importorskip("peft")
SHORT = ("--seqlen", "48", "--batch", "2", "--rank", "4", "--steps", "6", "--rate", "0.01")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model in four bits, with a text beside it."""
    work = tmp_path_factory.mktemp("finetune")
    (work / "text.txt").write_text(tiny_lm.TEXT, encoding="utf-8")
    quantize(tiny_lm.folder(work / "source", tiny_lm.model()), work / "base", format="int4-asym-g32")
    return work / "base"


def test_an_adapter(base: Path, tmp_path: Path, bitfold: Bitfold) -> None:
    text, out = str(base.with_name("text.txt")), tmp_path / "adapter"
    found = bitfold("finetune", base, "--data", text, "-o", out, *SHORT, "--json").json
    keys_are_documented("finetune", found)
    assert found["loss_after"] < found["loss_before"]
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
    again = bitfold("finetune", base, "--data", text, "-o", out, *SHORT)
    assert again.code not in (0, 70)
    assert "exists already" in again.err


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (("--data", "none.jsonl"), "no such text file"),
        (("--data", "TEXT", "--base-format", "nf4"), "quantized already"),
        (("--data", "TEXT", "--target", "nowhere"), "no adapters"),
        (("--data", "TEXT", "--minutes", "1"), "either so many steps or so many minutes"),
        ((), "--data"),
    ],
)
def test_mistakes_in_words(base: Path, tmp_path: Path, bitfold: Bitfold, wrong: tuple[str, ...], words: str) -> None:
    given = [str(base.with_name("text.txt")) if w == "TEXT" else w for w in wrong]
    run = bitfold("finetune", base, "-o", tmp_path / "out", *SHORT, *given)
    assert run.code not in (0, 70)
    assert words in run.err
    assert not (tmp_path / "out").exists()


def test_merged(base: Path, tmp_path: Path, bitfold: Bitfold) -> None:
    """The line that `finetune` ends with is the command."""
    text, adapter, out = base.with_name("text.txt"), tmp_path / "adapter", tmp_path / "out"
    run = bitfold("finetune", base, "--data", text, "-o", adapter, *SHORT)
    assert run.code == 0
    (line,) = [line for line in run.out.splitlines() if "bitfold merge" in line]
    words = line.partition("bitfold merge ")[2].replace("OUT", str(out)).split()
    found = bitfold("merge", *words, "--json").json
    keys_are_documented("merge", found)
    assert found["loss_merged"] < found["loss_base"]
    assert bitfold("merge", base, base, "--data", text, "-o", tmp_path / "no").code not in (0, 70)
    said = bitfold("merge", base, adapter, "--data", text, "-o", tmp_path / "again")
    assert "with the adapter" in said.out
