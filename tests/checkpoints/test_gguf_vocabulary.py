"""Tokenizers into GGUF metadata: read back, they make the same tokens of every text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bitfold.checkpoints.gguf.pre_tokenizers import PRE_TOKENIZERS
from bitfold.checkpoints.gguf.tokenizer import tokenizer_of
from bitfold.checkpoints.gguf.vocabulary import vocabulary_metadata
from bitfold.errors import CheckpointError
from bitfold.text.tokenizer import read_tokenizer
from gguf_vocabularies import GOLDEN, TEXTS, bpe, sentencepiece_metadata

__all__ = ["bpe"]
pytest.importorskip("transformers")
STYLES = {pre: name for name, pre in reversed(PRE_TOKENIZERS.items())}  # the first name of each


class Folder:
    """A checkpoint of nothing but a tokenizer."""

    def __init__(self, path: Path, ends: Any = None) -> None:
        self.path, self._ends = path, ends

    def copy_side_files(self, out_dir: Path) -> list[str]:
        return [file.name for file in self.path.iterdir()]

    def tokenizer(self) -> Any:
        return read_tokenizer(self.path)

    def generation_config(self) -> dict[str, Any]:
        return {} if self._ends is None else {"eos_token_id": self._ends}


def folder_of(metadata: dict[str, Any], path: Path) -> Path:
    found = tokenizer_of(metadata, "model.gguf")
    assert found is not None
    path.mkdir()
    found.write(path)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return path


def there_and_back(metadata: dict[str, Any], place: Path, rows: int | None = None) -> dict[str, Any]:
    """Metadata -> folder -> metadata; both folders' tokenizers must agree on every text."""
    first = folder_of(metadata, place / "a")
    count = len(metadata["tokenizer.ggml.tokens"]) if rows is None else rows
    again: dict[str, Any] = vocabulary_metadata(Folder(first), count)  # type: ignore[arg-type]
    second = folder_of({"general.architecture": "llama", **again}, place / "b")
    one, two = read_tokenizer(first), read_tokenizer(second)
    for text in [*TEXTS, *GOLDEN["texts"], "".join(one.all_special_tokens)]:
        assert one(text)["input_ids"] == two(text)["input_ids"], text
    return again


@pytest.mark.parametrize("pre", [name for name in STYLES.values() if name != "bailingmoe"])  # stablelm2 in other words
def test_every_way_of_cutting_keeps_its_name(pre: str, bpe: dict[str, Any], tmp_path: Path) -> None:
    metadata = {**bpe, "tokenizer.ggml.pre": pre}
    again = there_and_back(metadata, tmp_path)
    found = PRE_TOKENIZERS[again["tokenizer.ggml.pre"]]
    assert (found.splits, found.gpt2_rule) == (PRE_TOKENIZERS[pre].splits, PRE_TOKENIZERS[pre].gpt2_rule)
    assert found.ignore_merges == PRE_TOKENIZERS[pre].ignore_merges
    for key in ("model", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id"):
        assert again[f"tokenizer.ggml.{key}"] == metadata[f"tokenizer.ggml.{key}"]
    assert again["tokenizer.ggml.add_bos_token"] == PRE_TOKENIZERS[pre].add_bos
    assert again["tokenizer.chat_template"] == metadata["tokenizer.chat_template"]


@pytest.mark.parametrize("case", ["prefix", "no prefix"])
def test_sentencepiece(case: str, tmp_path: Path) -> None:
    metadata = sentencepiece_metadata(case)
    again = there_and_back(metadata, tmp_path)
    for key in ("model", "tokens", "token_type", "add_space_prefix", "unknown_token_id"):
        assert again[f"tokenizer.ggml.{key}"] == metadata[f"tokenizer.ggml.{key}"]


def test_rows_beyond_the_vocabulary(bpe: dict[str, Any], tmp_path: Path) -> None:
    """GGUF has one token for each row of the embedding: more are made up, and marked as not used; fewer are cut."""
    metadata, count = {**bpe, "tokenizer.ggml.pre": "gpt-2"}, len(bpe["tokenizer.ggml.tokens"])
    again = there_and_back(metadata, tmp_path, rows=count + 3)
    assert again["tokenizer.ggml.tokens"][count:] == [f"[PAD{i}]" for i in range(count, count + 3)]
    assert again["tokenizer.ggml.token_type"][count:] == [5, 5, 5]
    fewer = vocabulary_metadata(Folder(tmp_path / "a"), count - 2)  # type: ignore[arg-type]
    assert fewer["tokenizer.ggml.tokens"] == metadata["tokenizer.ggml.tokens"][:-2]


def test_ends_of_texts_turns_and_messages(bpe: dict[str, Any], tmp_path: Path) -> None:
    folder = folder_of({**bpe, "tokenizer.ggml.pre": "gpt-2"}, tmp_path / "a")
    found = vocabulary_metadata(Folder(folder, [2, 0]), 600)  # type: ignore[arg-type]
    assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.eot_token_id"]) == (2, 0)


def test_a_way_of_cutting_that_llama_cpp_does_not_know(bpe: dict[str, Any], tmp_path: Path) -> None:
    folder = folder_of({**bpe, "tokenizer.ggml.pre": "gpt-2"}, tmp_path / "a")
    document = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "e"}, "behavior": "Isolated", "invert": False}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, document["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="no name for"):
        vocabulary_metadata(Folder(folder), 600)  # type: ignore[arg-type]


def test_no_tokenizer_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has no tokenizer"):
        found = vocabulary_metadata(Folder(tmp_path), 10)  # type: ignore[arg-type]
    assert found == {"tokenizer.ggml.model": "no_vocab"}
