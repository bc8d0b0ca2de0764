"""tokenizer.json and its companions out of GGUF metadata.

GGUF stores a vocabulary and the *name* of the pre-tokenizer (`tokenizer.ggml.pre`); the splitting itself lives in the
reader. A wrong splitting still gives plausible tokens and quietly worse text (SmolLM's digits are the known case), so a
name that is not in PRE_TOKENIZERS is an error. Two kinds of model are read: byte-level BPE (`gpt2`), whose merges are
in the file, and SentencePiece BPE with byte fallback (`llama`), whose merges follow from the scores of its pieces.
The files are written as JSON, without needing the tokenizers library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitfold.errors import CheckpointError

_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6
_SPACE = "▁"

# Patterns as the models' own tokenizers define them; each piece that matches is a word of its own.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT4_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _GPT4_TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _GPT4_TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


@dataclass(frozen=True)
class Pre:
    """How text is cut before byte-level BPE.

    Args:
        splits: patterns applied one after the other; "digits" cuts every digit off; () leaves it all to GPT-2's rule.
        gpt2_rule: whether GPT-2's own pattern is applied last.
        normalizer: Unicode normalization, or None.
        ignore_merges: a word that is in the vocabulary is taken whole.
        add_bos: whether text begins with the BOS token when the file does not say.
    """

    splits: tuple[str, ...] = ()
    gpt2_rule: bool = False
    normalizer: str | None = None
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2_STYLE = Pre(gpt2_rule=True)
_DIGITS_STYLE = Pre(("digits",), gpt2_rule=True)
_LLAMA3_STYLE = Pre((_LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN_STYLE = Pre((_QWEN2,), normalizer="NFC")
PRE_TOKENIZERS: dict[str, Pre] = {
    "gpt-2": _GPT2_STYLE,
    "gpt2": _GPT2_STYLE,
    "phi-2": _GPT2_STYLE,
    "olmo": _GPT2_STYLE,
    "mpt": _GPT2_STYLE,
    "smollm": _DIGITS_STYLE,
    "starcoder": _DIGITS_STYLE,
    "refact": _DIGITS_STYLE,
    "command-r": _DIGITS_STYLE,
    "codeshell": _DIGITS_STYLE,
    "llama3": _LLAMA3_STYLE,
    "llama-v3": _LLAMA3_STYLE,
    "llama-bpe": _LLAMA3_STYLE,
    "falcon3": _LLAMA3_STYLE,
    "smaug-bpe": Pre((_LLAMA3,)),
    "dbrx": Pre((_LLAMA3,)),
    "qwen2": _QWEN_STYLE,
    "deepseek-r1-qwen": _QWEN_STYLE,
    "tekken": Pre((_TEKKEN,), ignore_merges=True),
    # llama.cpp's own rule for files that name no model's: it is what such files were made and judged with.
    "default": Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}


def write_tokenizer(metadata: Mapping[str, Any], out_dir: Path, where: str) -> list[str]:
    """Write tokenizer.json, tokenizer_config.json (with the chat template) and special_tokens_map.json.

    Returns the names written; none if the file carries no tokenizer.

    Raises:
        CheckpointError: a kind of tokenizer or a pre-tokenizer that is not known here, or lists that do not fit.
    """
    model = metadata.get("tokenizer.ggml.model", "none")
    if model in ("none", "no_vocab"):
        return []
    vocabulary = _Vocabulary(metadata, where)
    if model == "gpt2":
        tokenizer = _byte_level_bpe(vocabulary)
    elif model == "llama":
        tokenizer = _sentencepiece_bpe(vocabulary)
    else:
        hint = "byte-level BPE (gpt2) and SentencePiece BPE (llama) are supported"
        raise CheckpointError(f"tokenizers of kind {model!r} cannot be converted", where=where, hint=hint)
    special = vocabulary.special_tokens()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    config["model_max_length"] = metadata.get(f"{metadata.get('general.architecture')}.context_length", 10**30)
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": config, "special_tokens_map.json": special}
    config |= _chat_template(metadata)
    for name, content in files.items():
        (out_dir / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return list(files)


def generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Content of generation_config.json: begin, pad and all end tokens (end of text, of turn, of message)."""
    ends = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    stop = list(dict.fromkeys(e for e in ends if e is not None))
    config = {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": stop[0] if len(stop) == 1 else stop or None,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return {key: value for key, value in config.items() if value is not None}


class _Vocabulary:
    """The token lists of a GGUF file, checked against each other."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self.metadata, self.where = metadata, where
        self.tokens: list[str] = self._list("tokens", str, None)
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            raise CheckpointError("tokenizer.ggml.tokens holds the same token twice", where=where)
        self.types: list[int] = self._list("token_type", int, [_NORMAL] * len(self.tokens))

    def _list(self, key: str, kind: type, default: list[Any] | None) -> list[Any]:
        values = self.metadata.get(f"tokenizer.ggml.{key}", default)
        count = len(self.tokens) if key != "tokens" else None
        good = isinstance(values, list) and count in (None, len(values)) and all(isinstance(v, kind) for v in values)
        if not good:
            raise CheckpointError(f"tokenizer.ggml.{key} is missing or does not fit the tokens", where=self.where)
        return list(values or ())

    def scores(self) -> list[float]:
        """Score of each piece."""
        return self._list("scores", float, None)

    def merges(self) -> list[list[str]]:
        """The merges of byte-level BPE, pairs of tokens."""
        merges = self.metadata.get("tokenizer.ggml.merges")
        if not isinstance(merges, list) or not all(isinstance(m, str) and " " in m[1:] for m in merges):
            raise CheckpointError("tokenizer.ggml.merges is missing or damaged", where=self.where)
        # A token may itself begin with a space; the separator is the first one after its first character.
        return [[m[: (cut := m.index(" ", 1))], m[cut + 1 :]] for m in merges]

    def token(self, kind: str) -> str | None:
        """The token that plays a role (bos, eos, unknown, padding), if any."""
        index = self.metadata.get(f"tokenizer.ggml.{kind}_token_id")
        if index is None:
            return None
        if not isinstance(index, int) or not 0 <= index < len(self.tokens):
            raise CheckpointError(f"tokenizer.ggml.{kind}_token_id is {index!r}, not a token", where=self.where)
        return self.tokens[index]

    def special_tokens(self) -> dict[str, str]:
        """Entries of tokenizer_config.json."""
        roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        return {key: token for key, kind in roles.items() if (token := self.token(kind)) is not None}

    def added(self) -> list[dict[str, Any]]:
        """Tokens that are matched in the text before anything else."""
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [
            {"id": i, "content": token, **flags, "special": kind != _USER}
            for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (_CONTROL, _UNKNOWN, _USER) and token
        ]

    def flag(self, key: str, default: bool) -> bool:
        """A boolean of the tokenizer's metadata."""
        return bool(self.metadata.get(f"tokenizer.ggml.{key}", default))

    def template(self, add_bos: bool) -> dict[str, Any] | None:
        """Post-processor that puts BOS and EOS around the text; None if neither is wanted."""
        bos = self.token("bos") if self.flag("add_bos_token", add_bos) else None
        eos = self.token("eos") if self.flag("add_eos_token", False) else None
        if bos is None and eos is None:
            return None

        def around(sequence: str, type_id: int) -> list[dict[str, Any]]:
            edges = [[{"SpecialToken": {"id": t, "type_id": type_id}}] if t else [] for t in (bos, eos)]
            return [*edges[0], {"Sequence": {"id": sequence, "type_id": type_id}}, *edges[1]]

        special = {t: {"id": t, "ids": [self.ids[t]], "tokens": [t]} for t in (bos, eos) if t}
        single, pair = around("A", 0), around("A", 0) + around("B", 1)
        return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def _sequence(key: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    return steps[0] if len(steps) == 1 else {"type": "Sequence", key: steps}


def _document(vocabulary: _Vocabulary, model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    bpe = {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, **model}
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": vocabulary.added()}
    return {**head, **parts, "model": {**bpe, "vocab": vocabulary.ids}}


def _byte_level_bpe(vocabulary: _Vocabulary) -> dict[str, Any]:
    name = vocabulary.metadata.get("tokenizer.ggml.pre")
    if name not in PRE_TOKENIZERS:
        what = f"the pre-tokenizer {name!r} is not known" if name else "the file names no pre-tokenizer"
        hint = f"known: {', '.join(PRE_TOKENIZERS)}; guessing one would silently change the tokens"
        raise CheckpointError(f"{what} (tokenizer.ggml.pre)", where=vocabulary.where, hint=hint)
    pre = PRE_TOKENIZERS[name]
    template = vocabulary.template(pre.add_bos)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    splits = [_split(pattern) for pattern in pre.splits]
    post = {**byte_level, "use_regex": True}
    model = {"unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": pre.ignore_merges}
    return _document(
        vocabulary,
        {**model, "merges": vocabulary.merges()},
        normalizer={"type": pre.normalizer} if pre.normalizer else None,
        pre_tokenizer=_sequence("pretokenizers", [*splits, {**byte_level, "use_regex": pre.gpt2_rule}]),
        post_processor=post if template is None else _sequence("processors", [post, template]),
        decoder={**byte_level, "use_regex": True},
    )


def _split(pattern: str) -> dict[str, Any]:
    if pattern == "digits":
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _sentencepiece_bpe(vocabulary: _Vocabulary) -> dict[str, Any]:
    prefix = vocabulary.flag("add_space_prefix", True)
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    to_space = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    model = {"unk_token": vocabulary.token("unknown"), "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
    empty = {"type": "TemplateProcessing", "special_tokens": {}}
    plain = {**empty, "single": [{"Sequence": {"id": "A", "type_id": 0}}]}
    plain["pair"] = [*plain["single"], {"Sequence": {"id": "B", "type_id": 1}}]
    return _document(
        vocabulary,
        {**model, "merges": score_merges(vocabulary.tokens, vocabulary.types, vocabulary.scores())},
        normalizer=_sequence("normalizers", [*([{"type": "Prepend", "prepend": _SPACE}] if prefix else []), to_mark]),
        pre_tokenizer=None,
        post_processor=vocabulary.template(True) or plain,
        decoder=_sequence("decoders", [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]),
    )


def score_merges(tokens: list[str], types: list[int], scores: list[float]) -> list[list[str]]:
    """Merges equivalent to SentencePiece's scores: it always joins the neighbours whose union scores highest, so every
    way of cutting a piece into two pieces is a merge with the rank of the piece's score."""
    ids = {t: i for i, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind == _NORMAL}
    ranked = []
    for piece, index in ids.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                ranked.append((-scores[index], ids[left], ids[right]))
    return [[tokens[left], tokens[right]] for _, left, right in sorted(ranked)]


def _chat_template(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The default template, or the list of all if there are named ones (`tokenizer.chat_template.NAME`)."""
    default = metadata.get("tokenizer.chat_template")
    prefix = "tokenizer.chat_template."
    named = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    if not named:
        return {} if default is None else {"chat_template": default}
    every = {**({} if default is None else {"default": default}), **named}
    return {"chat_template": [{"name": name, "template": template} for name, template in every.items()]}
