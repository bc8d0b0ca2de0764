"""Tokenizers out of GGUF metadata: the same tokens as the tools that made the vocabularies."""

from __future__ import annotations

import json
import random
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from bitfold.checkpoints.gguf.pre_tokenizers import PRE_TOKENIZERS, USUAL, byte_letters, nearest
from bitfold.checkpoints.gguf.source import GgufSource
from bitfold.checkpoints.gguf.tokenizer import generation_config, score_merges, tokenizer_of
from bitfold.errors import CheckpointError, UsageError
from bitfold.system import native
from gguf_files import LLAMA, llama_tensors, write_gguf
from gguf_vocabularies import GOLDEN, TEXTS, bpe, sentencepiece_metadata

__all__ = ["bpe"]

tokenizers = pytest.importorskip("tokenizers")


def written(metadata: dict[str, Any], folder: Path) -> Any:
    """The tokenizer that the tokenizers library reads from what we wrote."""
    found = tokenizer_of(metadata, "model.gguf")
    assert found is not None
    assert "tokenizer.json" in found.write(folder)
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
    "gpt-4o": ["In", " ", "198", "7", " ,", " ", "123", "45", " people"],
    "deepseek-v3": ["In", " ", "198", "7", " ,", " ", "123", "45", " people"],
    "deepseek-coder": ["In", " ", "1", "9", "8", "7", " ,", " ", "1", "2", "3", "4", "5", " people"],
    "deepseek-llm": ["In", " ", "1987", " ,", " ", "12345", " people"],
    "falcon": ["In", " ", "198", "7", " ", ",", " ", "123", "45", " people"],
    "bloom": ["In", " 1987", " ,", " 12345", " people"],
    "viking": ["In", " ", "1", "9", "8", "7", " ,", " ", "1", "2", "3", "4", "5", " people"],
    "default": ["In", " ", "198", "7", " ", ",", " ", "123", "45", " people"],
}


def pieces(tokenizer: Any, text: str) -> list[str]:
    """How the text is cut before merging, as readable text."""
    alphabet = byte_letters()
    cut = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [bytes(alphabet[c] for c in piece).decode() for piece, _ in cut]


@pytest.mark.parametrize("pre", SPLITS)
def test_pre_tokenizers_cut_as_their_models_do(pre: str, bpe: dict[str, Any], tmp_path: Path):
    tokenizer = written({**bpe, "tokenizer.ggml.pre": pre}, tmp_path)
    assert pieces(tokenizer, "In 1987 , 12345 people") == SPLITS[pre]


def test_letters_and_contractions(bpe: dict[str, Any], tmp_path: Path):
    def cut(pre: str, text: str) -> list[str]:
        return pieces(written({**bpe, "tokenizer.ggml.pre": pre}, tmp_path), text)

    assert cut("tekken", "HTTPServer camelCase") == ["HTTPServer", " camel", "Case"]
    assert cut("llama-bpe", "we'LL\n\n  x(y)") == ["we", "'LL", "\n\n", " ", " x", "(y", ")"]
    assert cut("gpt-4o", "HTTPServer's camelCase") == ["HTTPServer's", " camel", "Case"]
    assert cut("deepseek-v3", "x(yes)\u4e2d\u3042 don't") == ["x", "(yes", ")", "\u4e2d\u3042", " don", "'t"]
    assert cut("deepseek-llm", "\u4e2d\u0431\u0431 x") == ["\u4e2d", "\u0431\u0431", " x"]
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


def test_what_cannot_be_read_says_so(bpe: dict[str, Any]):
    last = len(bpe["tokenizer.ggml.tokens"]) - 1
    cases: dict[str, dict[str, Any]] = {
        r"kind 'bert' \(WordPiece\)": {"tokenizer.ggml.model": "bert"},
        "kind 't5'": {"tokenizer.ggml.model": "t5"},
        "kind 'exotic'": {"tokenizer.ggml.model": "exotic"},
        "kind None": {"tokenizer.ggml.model": None},
        "'a' is twice in the vocabulary, as 0 and 2": {"tokenizer.ggml.tokens": ["a", "b", "a"]},
        "tokens is empty": {"tokenizer.ggml.tokens": []},
        "tokens is no list of str": {"tokenizer.ggml.tokens": [1, 2]},
        f"token_type has 1 entries for {last + 1} tokens": {"tokenizer.ggml.token_type": [1]},
        "'joined' in tokenizer.ggml.merges is no merge": {"tokenizer.ggml.merges": ["joined"]},
        "merges is missing": {"tokenizer.ggml.merges": None},
        "scores is missing": {"tokenizer.ggml.model": "llama"},
        "bos_token_id is 1000000": {"tokenizer.ggml.bos_token_id": 10**6},
        "chat_template is no text": {"tokenizer.chat_template": 7},
    }
    for message, change in cases.items():
        changed = {k: v for k, v in {**bpe, "tokenizer.ggml.pre": "qwen2", **change}.items() if v is not None}
        with pytest.raises(CheckpointError, match=message) as caught:
            tokenizer_of(changed, "model.gguf")
        assert "model.gguf" in str(caught.value)
    assert tokenizer_of({}, "model.gguf") is None
    assert tokenizer_of({"tokenizer.ggml.model": "none"}, "model.gguf") is None
    assert generation_config({}) == {}


def test_what_can_be_mended_is_mended_and_said(bpe: dict[str, Any], tmp_path: Path):
    named = {**bpe, "tokenizer.ggml.pre": "qwen2"}
    with pytest.warns(UserWarning, match="1 of .* merges make no token"):
        tokenizer_of({**named, "tokenizer.ggml.merges": [*named["tokenizer.ggml.merges"], "Q Q"]}, "m")
    for template in ("{% for m in messages %}{{ m", "{% endif %}"):
        with pytest.warns(UserWarning, match="chat template cannot be used: line 1"):
            tokenizer_of({**named, "tokenizer.chat_template": template}, "m")
    good = "{% generation %}{% for m in x %}{% break %}{% endfor %}{% endgeneration %}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer_of({**named, "tokenizer.chat_template": good}, "m")
    without = {k: v for k, v in named.items() if k != "tokenizer.ggml.token_type"}
    with pytest.warns(UserWarning, match="does not say what kind its tokens are"):
        tokenizer = written(without, tmp_path)
    assert tokenizer.encode("a<|im_end|>").ids[-1] == 2  # it ends a text, so it is special


@pytest.mark.parametrize("pre", ["exotic", None])
def test_an_unknown_pre_tokenizer_is_the_nearest_one_and_said(pre: str | None, bpe: dict[str, Any], tmp_path: Path):
    with pytest.warns(UserWarning, match=r"m.gguf: the .*'gpt-2', which fits the vocabulary best"):
        found = tokenizer_of({**bpe, **({"tokenizer.ggml.pre": pre} if pre else {})}, "m.gguf")
    assert found is not None
    assert found.pre == PRE_TOKENIZERS["gpt-2"]  # too small a vocabulary to tell


@pytest.mark.parametrize("pre", ["exotic", "qwen2", None])
def test_a_pre_tokenizer_that_is_chosen(pre: str | None, bpe: dict[str, Any]):
    """Whatever the file says, and without a word; names that are not known are told those that are."""
    said = {**bpe, **({"tokenizer.ggml.pre": pre} if pre else {})}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tokenizer_of(said, "m.gguf", "llama-bpe")
    assert found is not None
    assert found.pre == PRE_TOKENIZERS["llama-bpe"]
    with pytest.raises(UsageError, match="no pre-tokenizer 'llama'") as raised:
        tokenizer_of(said, "m.gguf", "llama")
    assert "llama-bpe, " in (raised.value.hint or "")


@pytest.mark.parametrize("pre", USUAL)
def test_the_nearest_pre_tokenizer_is_found_out_from_a_vocabulary(pre: str):
    """A vocabulary made under a rule is never cut by it, and by others it is."""
    steps = {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre].steps()}
    blank = {"pre_tokenizer": steps, "model": {"type": "BPE", "vocab": {}, "merges": []}}
    maker = tokenizers.Tokenizer.from_str(json.dumps(blank))
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=4000, show_progress=False)
    code = [
        f"item.getElementById(window.setTimeout, {n * n}); // it's {n}, JavaScript's innerHTML\n\n    return document"
        for n in range(1900, 2100)
    ]
    prose = (files("bitfold.text") / "data" / "wikitext2-valid.txt").read_text(encoding="utf-8")[:300_000]
    maker.train_from_iterator([prose, *code], trainer)
    assert nearest(list(maker.get_vocab())) == pre


@pytest.mark.skipif(native.core() is None, reason="both ways are compared")
def test_the_native_core_cuts_pieces_as_python_does(monkeypatch: pytest.MonkeyPatch):
    """Letters of one to four bytes, pieces with equal scores and with none that can be compared."""
    draw = random.Random(0)
    letters = "ab▁é你🙂"
    pieces = sorted({"".join(draw.choices(letters, k=draw.randrange(1, 7))) for _ in range(3000)} | {*letters, ""})
    scores = [float(draw.randrange(-40, 3)) for _ in pieces]
    types = [draw.choice((1, 1, 1, 3, 6)) for _ in pieces]
    found = score_merges(pieces, types, scores)
    assert len(found) > 100
    monkeypatch.setattr(native, "core", lambda: None)
    assert score_merges(pieces, types, scores) == found
    monkeypatch.undo()
    assert len(score_merges(pieces, types, [float("nan")] * len(pieces))) == len(found)
