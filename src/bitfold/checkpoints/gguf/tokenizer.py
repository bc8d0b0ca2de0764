"""tokenizer.json and its companions out of GGUF metadata.

Two kinds of model are read: byte-level BPE (`gpt2`), whose merges are in the file, and SentencePiece BPE with byte
fallback (`llama`), whose merges follow from the scores of its pieces. Everything is checked when the file is opened, so
that no run finds out after its work that there is no tokenizer to go with it. The files are written as JSON, without
needing the tokenizers library.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bitfold.checkpoints.gguf.pre_tokenizers import BYTE_LEVEL, PRE_TOKENIZERS, Pre, guessed
from bitfold.errors import CheckpointError, UsageError
from bitfold.system import native
from bitfold.text.plain_tokenizer import PlainTokenizer

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of tokens
SPACE = "▁"
_NO_TOKENIZER = ("none", "no_vocab")
_ENDS = ("eos", "eot", "eom")
_ROLES = (*("bos", "unknown", "padding"), *_ENDS)
TEMPLATE = "tokenizer.chat_template"
_REMAKE = "the file is damaged or not made by a sound tool: make it anew from the original model"
# What other kinds are, for messages.
_KINDS = {"bert": "WordPiece", "t5": "SentencePiece unigram", "rwkv": "RWKV's trie", "plamo2": "PLaMo-2's trie"}


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer that was found to be in order.

    Args:
        vocabulary: the token lists.
        pre: how byte-level BPE cuts words; None for SentencePiece.
    """

    vocabulary: _Vocabulary
    pre: Pre | None

    def write(self, out_dir: Path) -> list[str]:
        """Write tokenizer.json, tokenizer_config.json (with the chat template) and special_tokens_map.json.

        Returns the names written.
        """
        metadata, document = self.vocabulary.metadata, self._document()
        special = self.vocabulary.special_tokens()
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
        config["model_max_length"] = metadata.get(f"{metadata.get('general.architecture')}.context_length", 10**30)
        files = {"tokenizer.json": document, "tokenizer_config.json": config, "special_tokens_map.json": special}
        config |= _chat_template(metadata)
        for name, content in files.items():
            # Without indent: of a quarter of a million tokens the standard library would make its lines in ten seconds.
            (out_dir / name).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
        return list(files)

    def _document(self) -> dict[str, Any]:
        v = self.vocabulary
        return _sentencepiece_bpe(v) if self.pre is None else _byte_level_bpe(v, self.pre)

    def plain(self, whole: Callable[[], Any]) -> PlainTokenizer:
        """The same without a file in between: reading a vocabulary out of JSON takes longer than all else.

        Args:
            whole: makes transformers' tokenizer.
        """
        from tokenizers import AddedToken, Tokenizer
        from tokenizers.models import BPE

        document = self._document()
        model, added = document.pop("model"), document.pop("added_tokens")
        backend = Tokenizer.from_str(json.dumps({**document, "added_tokens": [], "model": _EMPTY}))
        model.pop("type")
        parts = (model.pop("vocab"), model.pop("merges"))
        backend.model = BPE(*parts, **{key: value for key, value in model.items() if value is not None})
        for special in (True, False):
            tokens = [
                AddedToken(t["content"], normalized=False, special=special) for t in added if t["special"] == special
            ]
            backend.add_special_tokens(tokens) if special else backend.add_tokens(tokens)
        template = _chat_template(self.vocabulary.metadata).get("chat_template")
        return PlainTokenizer(backend, self.vocabulary.special_tokens(), template, whole)


_EMPTY = {"type": "BPE", "vocab": {}, "merges": []}


def tokenizer_of(metadata: Mapping[str, Any], where: str, pre_tokenizer: str | None = None) -> GgufTokenizer | None:
    """The tokenizer that a file carries, checked; None if it says that it carries none.

    A pre-tokenizer that is not known is replaced by the nearest one, with a warning.

    Args:
        metadata: of the file.
        where: its name, for errors.
        pre_tokenizer: by which rule text is cut, whatever the file says.

    Raises:
        UsageError: a pre-tokenizer of no known name, or for a tokenizer that has none.
        CheckpointError: a kind of tokenizer that is not read here, or lists that do not fit; what is wrong, by name.
    """
    kind = metadata.get("tokenizer.ggml.model", "none" if "tokenizer.ggml.tokens" not in metadata else None)
    if kind in _NO_TOKENIZER:
        return None
    if kind not in ("gpt2", "llama"):
        name = f"{kind!r} ({_KINDS[kind]})" if kind in _KINDS else repr(kind)
        hint = "byte-level BPE (gpt2) and SentencePiece BPE (llama) are read; use the model's original folder"
        raise CheckpointError(f"a tokenizer of kind {name} cannot be read", where=where, hint=hint)
    vocabulary = _Vocabulary(metadata, where)
    vocabulary.check(merged=kind == "gpt2")
    _check_templates(metadata, where)
    if kind != "gpt2" and pre_tokenizer is not None:
        raise UsageError("its tokenizer (SentencePiece) cuts no text beforehand", where=f"--pre-tokenizer, {where}")
    return GgufTokenizer(vocabulary, _pre(vocabulary, pre_tokenizer) if kind == "gpt2" else None)


def _pre(vocabulary: _Vocabulary, chosen: str | None) -> Pre:
    """The rule that was chosen or that the file names, or the nearest one, said aloud."""
    if chosen is not None and chosen not in PRE_TOKENIZERS:
        hint = f"one of {', '.join(sorted(PRE_TOKENIZERS))}"
        raise UsageError(f"there is no pre-tokenizer {chosen!r}", where="--pre-tokenizer", hint=hint)
    name = chosen or vocabulary.metadata.get("tokenizer.ggml.pre")
    if name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name]
    taken, pre = guessed(vocabulary.normal())
    what = f"the pre-tokenizer {name!r} is not known" if name else "the file names no pre-tokenizer"
    warnings.warn(
        f"{vocabulary.where}: {what} (tokenizer.ggml.pre): text is cut by the rule of {taken!r}, which fits the"
        " vocabulary best; the tokens may differ a little from the model's own (quantize and convert take another by"
        " --pre-tokenizer NAME)",
        stacklevel=2,
    )
    return pre


def _check_templates(metadata: Mapping[str, Any], where: str) -> None:
    """Say at once that a chat template is of no use; it is carried over as it is."""
    for key, template in metadata.items():
        if key != TEMPLATE and not key.startswith(f"{TEMPLATE}."):
            continue
        if not isinstance(template, str):
            raise CheckpointError(f"{key} is no text", where=where, hint="the file is damaged")
        if (fault := template_fault(template)) is not None:
            warnings.warn(f"{where}: the chat template cannot be used: {fault} ({key})", stacklevel=2)


def template_fault(template: str) -> str | None:
    """Why a chat template does not parse; None if it does, or if jinja2 is not there to tell."""
    try:
        from jinja2 import TemplateSyntaxError, nodes
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        return None

    class Generation(Extension):
        """{% generation %} of transformers, which marks what the assistant says."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    extensions = [Generation, "jinja2.ext.loopcontrols"]
    try:
        ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions).parse(template)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    return None


def generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Content of generation_config.json: begin, pad and all end tokens (end of text, of turn, of message)."""
    ends = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in _ENDS]
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
            last = next(i for i, token in enumerate(self.tokens) if self.ids[token] != i)
            token = self.tokens[last]
            what = f"the token {token!r} is twice in the vocabulary, as {last} and {self.ids[token]}"
            hint = "no tokenizer can have that; make the file anew from the original model"
            raise CheckpointError(f"{what} (tokenizer.ggml.tokens)", where=where, hint=hint)
        self.types: list[int] = self._types()

    def _types(self) -> list[int]:
        if "tokenizer.ggml.token_type" in self.metadata:
            return self._list("token_type", int, None)
        special = {self.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in _ROLES}
        warnings.warn(
            f"{self.where}: the file does not say what kind its tokens are (tokenizer.ggml.token_type): only those that"
            " begin, end or pad a text are taken as special ones",
            stacklevel=2,
        )
        return [CONTROL if i in special else NORMAL for i in range(len(self.tokens))]

    def _list(self, key: str, kind: type, default: list[Any] | None) -> list[Any]:
        values, full = self.metadata.get(f"tokenizer.ggml.{key}", default), f"tokenizer.ggml.{key}"
        if values is None:
            raise CheckpointError(f"{full} is missing", where=self.where, hint=_REMAKE)
        if not isinstance(values, list) or not set(map(type, values)) <= {kind}:
            raise CheckpointError(f"{full} is no list of {kind.__name__}", where=self.where, hint=_REMAKE)
        if key != "tokens" and len(values) != len(self.tokens):
            what = f"{full} has {len(values)} entries for {len(self.tokens)} tokens"
            raise CheckpointError(what, where=self.where, hint=_REMAKE)
        if not values:
            raise CheckpointError(f"{full} is empty", where=self.where, hint=_REMAKE)
        return list(values)

    def check(self, *, merged: bool) -> None:
        """Everything that writing the tokenizer will need: merges or scores, and the tokens that play a role.

        Raises:
            CheckpointError: what is missing or does not fit.
        """
        for role in _ROLES:
            self.token(role)
        if merged:
            self.merges  # noqa: B018 - read, and checked, now
        else:
            self.scores()

    def normal(self) -> list[str]:
        """The tokens that came about by merging."""
        return [t for t, kind in zip(self.tokens, self.types, strict=True) if kind == NORMAL]

    def scores(self) -> list[float]:
        """Score of each piece."""
        return self._list("scores", float, None)

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        """The merges of byte-level BPE, pairs of tokens."""
        merges = self.metadata.get("tokenizer.ggml.merges")
        if not isinstance(merges, list):
            raise CheckpointError("tokenizer.ggml.merges is missing", where=self.where, hint=_REMAKE)
        # llama.cpp falls back to bytes where a merge makes no token, which is as if there were no such merge; the
        # tokenizers library refuses them.
        ids, good = self.ids, []
        for merge in merges:
            # A token may itself begin with a space; the separator is the first one after its first character.
            if type(merge) is not str or (cut := merge.find(" ", 1)) < 1:
                raise CheckpointError(f"{merge!r} in tokenizer.ggml.merges is no merge", where=self.where, hint=_REMAKE)
            left, right = merge[:cut], merge[cut + 1 :]
            if left in ids and right in ids and left + right in ids:
                good.append((left, right))
        if len(good) < len(merges):
            left = f"{len(merges) - len(good)} of {len(merges)} merges make no token of the vocabulary and are left out"
            warnings.warn(f"{self.where}: {left} (tokenizer.ggml.merges)", stacklevel=2)
        return good

    def token(self, kind: str) -> str | None:
        """The token that plays a role (bos, eos, unknown, padding), if any."""
        index = self.metadata.get(f"tokenizer.ggml.{kind}_token_id")
        if index is None:
            return None
        if not isinstance(index, int) or not 0 <= index < len(self.tokens):
            what = f"tokenizer.ggml.{kind}_token_id is {index!r}, and there are {len(self.tokens)} tokens"
            raise CheckpointError(what, where=self.where, hint=_REMAKE)
        return self.tokens[index]

    def special_tokens(self) -> dict[str, str]:
        """Entries of tokenizer_config.json."""
        roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        return {key: token for key, kind in roles.items() if (token := self.token(kind)) is not None}

    def added(self) -> list[dict[str, Any]]:
        """Tokens that are matched in the text before anything else."""
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [
            {"id": i, "content": token, **flags, "special": kind != USER}
            for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (CONTROL, UNKNOWN, USER) and token
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


def _byte_level_bpe(vocabulary: _Vocabulary, pre: Pre) -> dict[str, Any]:
    template = vocabulary.template(pre.add_bos)
    post = {**BYTE_LEVEL, "use_regex": True}
    model = {"unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": pre.ignore_merges}
    return _document(
        vocabulary,
        {**model, "merges": vocabulary.merges},
        normalizer={"type": pre.normalizer} if pre.normalizer else None,
        pre_tokenizer=_sequence("pretokenizers", pre.steps()),
        post_processor=post if template is None else _sequence("processors", [post, template]),
        decoder=post,
    )


def _sentencepiece_bpe(vocabulary: _Vocabulary) -> dict[str, Any]:
    prefix = vocabulary.flag("add_space_prefix", True)
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    to_space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    model = {"unk_token": vocabulary.token("unknown"), "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
    empty = {"type": "TemplateProcessing", "special_tokens": {}}
    plain = {**empty, "single": [{"Sequence": {"id": "A", "type_id": 0}}]}
    plain["pair"] = [*plain["single"], {"Sequence": {"id": "B", "type_id": 1}}]
    return _document(
        vocabulary,
        {**model, "merges": score_merges(vocabulary.tokens, vocabulary.types, vocabulary.scores())},
        normalizer=_sequence("normalizers", [*([{"type": "Prepend", "prepend": SPACE}] if prefix else []), to_mark]),
        pre_tokenizer=None,
        post_processor=vocabulary.template(True) or plain,
        decoder=_sequence("decoders", [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]),
    )


def score_merges(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Merges equivalent to SentencePiece's scores: it always joins the neighbours whose union scores highest, so every
    way of cutting a piece into two pieces is a merge with the rank of the piece's score."""
    chosen = [i for i, kind in enumerate(types) if kind == NORMAL]
    pieces = [tokens[i] for i in chosen]
    core = native.core()
    if core is None:
        return _score_merges(pieces, [scores[i] for i in chosen])
    values = np.array([scores[i] for i in chosen], dtype=np.float32)
    found: list[tuple[str, str]] = core.merges_by_score(pieces, values.ctypes.data)
    return found


def _score_merges(pieces: list[str], scores: list[float]) -> list[tuple[str, str]]:
    ids = {piece: i for i, piece in enumerate(pieces)}
    ranked = []
    for piece, score in zip(pieces, scores, strict=True):
        for cut in range(1, len(piece)):
            if (left := ids.get(piece[:cut])) is not None and (right := ids.get(piece[cut:])) is not None:
                ranked.append((-score, left, right))
    return [(pieces[left], pieces[right]) for _, left, right in sorted(ranked)]


def _chat_template(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The default template, or the list of all if there are named ones (`tokenizer.chat_template.NAME`)."""
    default, prefix = metadata.get(TEMPLATE), f"{TEMPLATE}."
    named = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    if not named:
        return {} if default is None else {"chat_template": default}
    every = {**({} if default is None else {"default": default}), **named}
    return {"chat_template": [{"name": name, "template": template} for name, template in every.items()]}
