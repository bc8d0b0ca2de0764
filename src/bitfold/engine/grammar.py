"""Texts that must be sentences of a grammar: which tokens may come next, by llguidance (an extra).

A JSON schema, a regular expression or a context-free grammar becomes a matcher, which walks along with the text; a
token that cannot go on with a sentence gets no probability. End tokens are allowed where a sentence may end.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bitfold.errors import CheckpointError, ModelError, UsageError
from bitfold.text.plain_tokenizer import PlainTokenizer

JSON_SCHEMA, REGEX, GRAMMAR = "json_schema", "regex", "grammar"
# White space between the tokens of JSON as layouts have it, and no more: small models would write it for ever.
_WHITESPACE = {"whitespace_pattern": r"( |\n {0,24})?"}


class Matcher(Protocol):
    """Where in its grammar a text is."""

    @property
    def stopped(self) -> bool:
        """Whether nothing but an end may follow."""
        ...

    def allowed(self, vocabulary: int) -> Tensor:
        """Which tokens may follow; bool (vocabulary)."""
        ...

    def consume(self, token: int) -> None:
        """Go on by a token."""
        ...


@dataclass(frozen=True)
class Grammar:
    """What a text must be a sentence of.

    Args:
        kind: "json_schema"; "regex", of Rust's regex crate, for the whole text; or "grammar", in llguidance's variant
            of Lark's notation or in llama.cpp's GBNF.
        text: the schema, expression or grammar.

    Raises:
        UsageError: llguidance is not there, or it cannot use the text.
    """

    kind: str
    text: str

    def __post_init__(self) -> None:
        _llguidance()
        message = _validate(self.compiled())
        if message:
            first = " ".join(message.split())
            raise UsageError(f"it cannot be used: {first[:400]}", where=_NAMES[self.kind])

    @classmethod
    def read(cls, kind: str, path: Path) -> Grammar:
        """Out of a file. CheckpointError: it cannot be read; UsageError as the class."""
        try:
            return cls(kind, path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot be read: {error}", where=str(path)) from error

    def compiled(self) -> str:
        """As llguidance reads it. UsageError: not JSON, or no grammar."""
        library = _llguidance()
        try:
            if self.kind == JSON_SCHEMA:
                schema = json.loads(self.text)
                if isinstance(schema, bool):  # true allows anything
                    schema = {} if schema else {"not": {}}
                return str(library.LLMatcher.grammar_from_json_schema(schema, overrides=_WHITESPACE))
            if self.kind == REGEX:
                return str(library.LLMatcher.grammar_from_regex(self.text))
            return str(library.grammar_from("grammar", self.text))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"it cannot be used: {error}", where=_NAMES[self.kind]) from error


_NAMES = {JSON_SCHEMA: "the JSON schema", REGEX: "the regular expression", GRAMMAR: "the grammar"}


class Guide:
    """Makes matchers for one tokenizer; takes part of a second to make.

    Args:
        tokenizer: of transformers, a fast one, or what can make it.
        ends: end tokens of the model.

    Raises:
        UsageError: llguidance is not there, or has no code for the tokenizer.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int]) -> None:
        _llguidance()
        from llguidance import hf

        known = list(ends) or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
        try:
            whole = tokenizer.whole() if isinstance(tokenizer, PlainTokenizer) else tokenizer
            self._tokenizer: Any = hf.from_tokenizer(whole, eos_token=known or None)
        except Exception as error:  # the library raises what its readers stumble over
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UsageError(f"llguidance has no code for the model's tokenizer: {first}", where="a grammar") from error

    def matcher(self, grammar: Grammar) -> Matcher:
        """At the beginning of a text. UsageError: the grammar cannot be used with these tokens."""
        made = _llguidance().LLMatcher(self._tokenizer, grammar.compiled(), log_level=0)
        if made.is_error():
            raise UsageError(f"it cannot be used: {made.get_error()}", where=_NAMES[grammar.kind])
        return _Matcher(made)


class _Matcher:
    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def stopped(self) -> bool:
        return bool(self._matcher.is_stopped())

    def allowed(self, vocabulary: int) -> Tensor:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        mask = torch.zeros(vocabulary, dtype=torch.bool)
        found = torch.from_numpy(np.unpackbits(bits, bitorder="little", count=min(vocabulary, 8 * len(bits))))
        mask[: len(found)] = found.bool()
        return mask

    def consume(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ModelError(f"the text has left its grammar: {self._matcher.get_error()}")


def _validate(compiled: str) -> str:
    failed, messages = _llguidance().LLMatcher.validate_grammar_with_warnings(compiled)
    return "; ".join(messages) if failed else ""


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise UsageError("grammars need llguidance", hint="pip install 'bitfold[grammar]'") from error
    return llguidance
