"""A tokenizer without transformers' class makes the same tokens, or is not taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_lm
from bitfold.checkpoints.gguf.pre_tokenizers import PRE_TOKENIZERS
from bitfold.checkpoints.gguf.tokenizer import tokenizer_of
from bitfold.text.plain_tokenizer import PlainTokenizer, read_plain
from bitfold.text.start import text_ends
from bitfold.text.tokenizer import read_tokenizer
from gguf_vocabularies import GOLDEN, SPECIAL, TEXTS, bpe, sentencepiece_metadata

__all__ = ["bpe"]

MESSAGES = [{"role": "user", "content": "Hello there"}]


def check_same(plain: Any, whole: Any) -> None:
    for text in [*TEXTS, *GOLDEN["texts"], tiny_lm.TEXT, "<|im_start|>a<|im_end|>", "<mark>b", "a<end>b"]:
        for special in (True, False):
            ids = whole(text, add_special_tokens=special)["input_ids"]
            assert plain(text, add_special_tokens=special)["input_ids"] == ids, text
            assert plain.convert_ids_to_tokens(ids) == whole.convert_ids_to_tokens(ids)
            for skip in (True, False):
                assert plain.decode(ids, skip_special_tokens=skip) == whole.decode(ids, skip_special_tokens=skip)
    assert len(plain) == len(whole)
    assert plain.eos_token_id == whole.eos_token_id
    assert text_ends(plain) == text_ends(whole)
    assert bool(plain.chat_template) == bool(whole.chat_template)
    if plain.chat_template:
        for more in ({"tokenize": False}, {}, {"return_tensors": "pt", "return_dict": True}):
            made = [t.apply_chat_template(MESSAGES, add_generation_prompt=True, **more) for t in (plain, whole)]
            texts = [x if isinstance(x, str) else [int(i) for i in _flat(x["input_ids"])] for x in made]
            assert texts[0] == texts[1]


def _flat(ids: Any) -> Any:
    return ids if isinstance(ids, list) else ids[0].tolist()


def read(metadata: dict[str, Any], folder: Path) -> tuple[PlainTokenizer, Any]:
    found = tokenizer_of(metadata, "a file")
    assert found is not None
    found.write(folder)
    return found.plain(lambda: None), read_tokenizer(folder)


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_rule_of_byte_level_vocabularies(pre: str, bpe: dict[str, Any], tmp_path: Path):
    check_same(*read({**bpe, "tokenizer.ggml.pre": pre}, tmp_path))


@pytest.mark.parametrize("case", ["prefix", "no prefix"])
def test_sentencepiece(case: str, tmp_path: Path):
    check_same(*read(sentencepiece_metadata(case), tmp_path))


def test_what_a_file_says_beside_its_vocabulary(bpe: dict[str, Any], tmp_path: Path):
    more = {
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": tiny_lm.CHAT,
    }
    check_same(*read({**bpe, "tokenizer.ggml.pre": "gpt-2", **more}, tmp_path))


def folder(path: Path, **settings: Any) -> Path:
    """A folder whose tokenizer.json is taken as it is, but for these settings."""
    tiny_lm.tokenizer().save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"model_type": settings.pop("model_type", "llama")}))
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return path


def test_folders(tmp_path: Path):
    path = folder(tmp_path)
    plain = read_tokenizer(path, plain=True)
    assert isinstance(plain, PlainTokenizer)
    check_same(plain, read_tokenizer(path))
    check_same(plain, plain.whole())


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"tokenizer_class": None},
        {"add_bos_token": True},
        {"added_tokens_decoder": {}},
        {"model_type": "mistral"},
        {"eos_token": "<new>"},
        {"eos_token": {"content": "<end>"}},
    ],
)
def test_settings_that_transformers_acts_upon_are_left_to_it(settings: dict[str, Any], tmp_path: Path):
    assert read_plain(folder(tmp_path, **settings), lambda: None) is None


def test_files_that_are_not_there_or_damaged(tmp_path: Path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder(tmp_path / name)
        (path / name).write_text("{")
        assert read_plain(path, lambda: None) is None
        (path / name).unlink()
        assert read_plain(path, lambda: None) is None


def test_padding_and_truncation_of_the_file_are_off(tmp_path: Path):
    made = tiny_lm.tokenizer()
    made.backend_tokenizer.enable_truncation(max_length=4)
    made.backend_tokenizer.enable_padding(length=9)
    made.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    plain = read_plain(tmp_path, lambda: None)
    assert plain is not None
    assert len(plain("a long text")["input_ids"]) == 11


def test_special_tokens_of_the_file_stay_special(bpe: dict[str, Any], tmp_path: Path):
    plain, _ = read({**bpe, "tokenizer.ggml.pre": "gpt-2"}, tmp_path)
    for token in SPECIAL:
        ids = plain(f"a{token}b", add_special_tokens=False)["input_ids"]
        assert plain.decode(ids, skip_special_tokens=True) == "ab"
