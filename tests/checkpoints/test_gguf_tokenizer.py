"""Tokenizers out of GGUF metadata: the same tokens as the tools that made the vocabularies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bitfold.checkpoints.gguf.source import GgufSource
from bitfold.checkpoints.gguf.tokenizer import PRE_TOKENIZERS, generation_config, write_tokenizer
from bitfold.errors import CheckpointError
from gguf_files import LLAMA, llama_tensors, write_gguf

tokenizers = pytest.importorskip("tokenizers")

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "sentencepiece.json").read_text(encoding="utf-8"))
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "In 1987 , 12345 people",
    "  leading and\n\nlines\t",
    "it's we'LL naïve café 你好 🙂 ½",
    "",
    " ",
    "camelCase HTTPServer",
]


def sentencepiece_metadata(case: str) -> dict[str, Any]:
    """What the converter stores of the golden SentencePiece models."""
    user = ["<mark>"] if case == "no prefix" else []
    byte_pieces = [f"<0x{b:02X}>" for b in range(256)]
    pieces = GOLDEN[case]["pieces"]
    types = [2, 3, 3] + [4] * len(user) + [6] * 256 + [1] * len(pieces)
    scores = [0.0] * (len(types) - len(pieces)) + [-float(i) for i in range(len(pieces))]
    roles = {"bos": 1, "eos": 2, "unknown": 0}
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *user, *byte_pieces, *pieces],
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": case == "prefix",
        **{f"tokenizer.ggml.{role}_token_id": index for role, index in roles.items()},
    }


@pytest.fixture(scope="module")
def bpe() -> dict[str, Any]:
    """Metadata of a byte-level BPE trained here, without a pre-tokenizer's name."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    trained.train_from_iterator([*TEXTS, *GOLDEN["texts"]] * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "general.architecture": "llama",
        "llama.context_length": 512,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "tokenizer.ggml.merges": [" ".join(m) for m in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }


def written(metadata: dict[str, Any], folder: Path) -> Any:
    """The tokenizer that the tokenizers library reads from what we wrote."""
    assert "tokenizer.json" in write_tokenizer(metadata, folder, "model.gguf")
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("case", ["prefix", "no prefix"])
def test_sentencepiece_ids(case: str, tmp_path: Path):
    tokenizer = written(sentencepiece_metadata(case), tmp_path)
    for text, ids in zip(GOLDEN["texts"], GOLDEN[case]["ids"], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("Hello").ids[0] == 1  # SentencePiece models begin with BOS unless the file says no


def test_user_defined_pieces_are_matched_first(tmp_path: Path):
    tokenizer = written(sentencepiece_metadata("no prefix"), tmp_path)
    assert tokenizer.encode("the<mark>the", add_special_tokens=False).ids.count(3) == 1
    assert tokenizer.decode([3], skip_special_tokens=True) == "<mark>"  # not special, only indivisible


SPLITS = {
    "gpt-2": ["In", " 1987", " ,", " 12345", " people"],
    "smollm": ["In", " ", "1", "9", "8", "7", " ,", " ", "1", "2", "3", "4", "5", " people"],
    "llama-bpe": ["In", " ", "198", "7", " ,", " ", "123", "45", " people"],
    "qwen2": ["In", " ", "1", "9", "8", "7", " ,", " ", "1", "2", "3", "4", "5", " people"],
    "tekken": ["In", " ", "1", "9", "8", "7", " ,", " ", "1", "2", "3", "4", "5", " people"],
    "default": ["In", " ", "198", "7", " ", ",", " ", "123", "45", " people"],
}


def pieces(tokenizer: Any, text: str) -> list[str]:
    """How the text is cut before merging, as readable text."""
    alphabet = {c: b for b, c in _byte_alphabet().items()}
    cut = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [bytes(alphabet[c] for c in piece).decode() for piece, _ in cut]


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


@pytest.mark.parametrize("pre", SPLITS)
def test_pre_tokenizers_cut_as_their_models_do(pre: str, bpe: dict[str, Any], tmp_path: Path):
    tokenizer = written({**bpe, "tokenizer.ggml.pre": pre}, tmp_path)
    assert pieces(tokenizer, "In 1987 , 12345 people") == SPLITS[pre]


def test_letters_and_contractions(bpe: dict[str, Any], tmp_path: Path):
    def cut(pre: str, text: str) -> list[str]:
        return pieces(written({**bpe, "tokenizer.ggml.pre": pre}, tmp_path), text)

    assert cut("tekken", "HTTPServer camelCase") == ["HTTPServer", " camel", "Case"]
    assert cut("llama-bpe", "we'LL\n\n  x(y)") == ["we", "'LL", "\n\n", " ", " x", "(y", ")"]
    assert cut("gpt-2", "we'LL\n\n  x(y)") == ["we", "'", "LL", "\n\n ", " x", "(", "y", ")"]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_row_loads_and_comes_back(pre: str, bpe: dict[str, Any], tmp_path: Path):
    tokenizer = written({**bpe, "tokenizer.ggml.pre": pre}, tmp_path)
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert (ids[:1] == [1]) == PRE_TOKENIZERS[pre].add_bos


def test_ids_are_those_of_the_library_s_own_tokenizer(bpe: dict[str, Any], tmp_path: Path):
    """smollm: digits one by one, then GPT-2's rule, assembled here from the library's parts."""
    vocab = {t: i for i, t in enumerate(bpe["tokenizer.ggml.tokens"])}
    merges = [tuple(m.split(" ")) for m in bpe["tokenizer.ggml.merges"]]
    expected = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    pre = tokenizers.pre_tokenizers
    expected.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    found = written({**bpe, "tokenizer.ggml.pre": "smollm"}, tmp_path)
    for text in [*TEXTS, *GOLDEN["texts"]]:
        assert found.encode(text).ids == expected.encode(text).ids
    assert found.encode("<|im_start|>In<|im_end|>").ids[0] == 1


def test_transformers_loads_what_was_written(bpe: dict[str, Any], tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    metadata = {**LLAMA, **bpe, "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.eot_token_id": 0}
    metadata.pop("general.architecture")
    source = GgufSource(write_gguf(tmp_path / "m.gguf", "llama", llama_tensors(), metadata))
    names = source.copy_side_files(tmp_path)
    assert sorted(names) == sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".json")
    (tmp_path / "config.json").write_text(json.dumps(source.config))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer("1987")["input_ids"] == [tokenizer.convert_tokens_to_ids(c) for c in "1987"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_begin_and_end_tokens(bpe: dict[str, Any], tmp_path: Path):
    flags = {"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer = written({**bpe, **flags}, tmp_path)
    ids = tokenizer.encode("In").ids
    assert (ids[0], ids[-1]) == (1, 2)
    no_bos = {**bpe, "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}
    assert written(no_bos, tmp_path).encode("In").ids[0] != 1


def test_named_chat_templates(bpe: dict[str, Any], tmp_path: Path):
    named = {"tokenizer.ggml.pre": "qwen2", "tokenizer.chat_template.tool_use": "T"}
    written({**bpe, **named}, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert [t["name"] for t in config["chat_template"]] == ["default", "tool_use"]


def test_what_cannot_be_converted_says_so(bpe: dict[str, Any], tmp_path: Path):
    cases = {
        "names no pre-tokenizer": {},
        "'exotic' is not known": {"tokenizer.ggml.pre": "exotic"},
        "kind 'bert'": {"tokenizer.ggml.model": "bert"},
        "same token twice": {"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": ["a", "a"]},
        "token_type is missing": {"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.token_type": [1]},
        "merges is missing": {"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.merges": ["joined"]},
        "not a token": {"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.bos_token_id": 10**6},
    }
    for message, change in cases.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            write_tokenizer({**bpe, **change}, tmp_path, "model.gguf")
        assert "model.gguf" in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert write_tokenizer({}, tmp_path, "model.gguf") == []
    assert generation_config({}) == {}
