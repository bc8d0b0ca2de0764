"""A tokenizer as GGUF metadata: the inverse of `tokenizer`.

What counts is what the tokenizer does, as transformers has loaded it: whether a text begins with BOS is tried, and the
name of the pre-tokenizer is that of the rule that cuts a text full of traps in the same places.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

from bitfold.checkpoints.base import Source
from bitfold.checkpoints.gguf.pre_tokenizers import PRE_TOKENIZERS, Pre, cut_by
from bitfold.checkpoints.gguf.tokenizer import BYTE, CONTROL, NORMAL, SPACE, TEMPLATE, UNKNOWN, UNUSED, USER
from bitfold.errors import CheckpointError
from bitfold.text.tokenizer import is_tokenizer

# Where rules that look alike part: digits, contractions, camel case, marks, scripts, rows of blanks and line ends.
_PROBES = (
    "In 1987, 12345.67 people of camelCase weren't there: we'LL see setTimeout(getElementById, 100) of /lib/DNSServer"
    "\n\n  return foo_bar\t\t...!!! \n",
    "I'm, I'M, don't, DON'T they'Re ''''''```````\"\"\"\"......!!!!!!??????"
    " 3 33 333 3333 33333 333333 3333333 3.3 3..3 x  12 y   345\t\t6\n 7",
    " \n\n\n \n\n\n\t\n\t\t \t\n  \n   \n    \nHello  World   !\r\n\r\n x\r\ny  \n",
    "Cửa Việt naïve cafe\u0301 Straße ÆØÅ ǅ été e\u0301e\u0301 Ελληνικά русский язык ИЗ Москвы 1\u00b2\u00b3 ½ ٣٤٥",
    "国家一二三 日本語のテキスト、カタカナ。 한국어 문장 ไทย हिन्दी नमस्ते عربى שלום"
    " \U0001f680 (normal) \U0001f936\U0001f3ff ✅ $a+b=c^2|~`<x>",
    "https://example.org/a-b_c?d=1&e=%20#f; {json: [1, 2, 3]}"
    " //comment\n\n/// C++ #include <x>\n\tint main(){return 0;}",
)
_SPM_UNUSED = -10000.0  # the score that llama.cpp's converter gives to rows without a piece


def vocabulary_metadata(source: Source, rows: int) -> dict[str, Any]:
    """The metadata of the tokenizer of a checkpoint; of none, with a warning, where it has none.

    Args:
        source: the checkpoint.
        rows: of the embedding; GGUF has exactly one token for each.

    Raises:
        CheckpointError: a tokenizer that cannot be read, or that llama.cpp has no name for.
    """
    with tempfile.TemporaryDirectory(prefix="bitfold-gguf-") as folder:
        names = source.copy_side_files(Path(folder))
    if not any(is_tokenizer(name) for name in names):
        warnings.warn(
            f"{source.path}: has no tokenizer: the GGUF file will run on token numbers alone, without text",
            stacklevel=2,
        )
        return {"tokenizer.ggml.model": "no_vocab"}
    tokenizer = source.tokenizer()
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    maker = _Maker(document, tokenizer, rows, str(source.path))
    ends = source.generation_config().get("eos_token_id")
    return {**maker.model(), **maker.roles(ends), **_templates(tokenizer.chat_template)}


class _Maker:
    """Metadata of one tokenizer.

    Args:
        document: contents of its tokenizer.json, as transformers runs it.
        tokenizer: of transformers.
        rows: of the embedding.
        where: the checkpoint, for messages.
    """

    def __init__(self, document: dict[str, Any], tokenizer: Any, rows: int, where: str) -> None:
        self.document, self.tokenizer, self.rows, self.where = document, tokenizer, rows, where
        self.parts: dict[str, Any] = document["model"]
        self.added = {entry["id"]: entry for entry in document.get("added_tokens", ())}
        found = {index: piece for piece, index in self.parts.get("vocab", {}).items()} if self._is_bpe() else {}
        found |= {index: entry["content"] for index, entry in self.added.items()}
        self.tokens = {index: piece for index, piece in found.items() if index < rows}

    def _is_bpe(self) -> bool:
        return self.parts.get("type") == "BPE"

    def model(self) -> dict[str, Any]:
        """Tokens, their kinds, merges or scores, and how text is cut before."""
        if self._is_bpe() and '"ByteLevel"' in json.dumps(self.document.get("pre_tokenizer")):
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in self.parts["merges"]]
            kind = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": self._pre()}
            return {**kind, **self._lists(), "tokenizer.ggml.merges": merges}
        if self._is_bpe() and self.parts.get("byte_fallback"):
            kind = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
            prefix = {"tokenizer.ggml.add_space_prefix": self._prefixes()}
            return {**kind, **self._lists(), "tokenizer.ggml.scores": self._scores(), **prefix}
        what = f"a tokenizer of kind {self.parts.get('type')} cannot be written as GGUF"
        hint = "byte-level BPE and SentencePiece BPE with byte fallback can"
        raise CheckpointError(what, where=self.where, hint=hint)

    def _lists(self) -> dict[str, Any]:
        tokens = [self.tokens.get(i, f"[PAD{i}]") for i in range(self.rows)]
        kinds = [self._kind(i, token) for i, token in enumerate(tokens)]
        return {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}

    def _kind(self, index: int, token: str) -> int:
        if index not in self.tokens:
            return UNUSED
        if token == self.parts.get("unk_token"):
            return UNKNOWN
        if index in self.added:
            return CONTROL if self.added[index].get("special") else USER
        hexadecimal = self.parts.get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
        return BYTE if hexadecimal and token.endswith(">") else NORMAL

    def _scores(self) -> list[float]:
        """SentencePiece joins the neighbours whose union scores highest: the rank of the merge that makes a piece."""
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(self.parts["merges"]):
            ranks.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), rank)
        last = len(self.parts["merges"])
        of = {index: -float(ranks.get(token, last + index)) for index, token in self.tokens.items()}
        return [of.get(i, _SPM_UNUSED - last - self.rows) for i in range(self.rows)]

    def _prefixes(self) -> bool:
        """Whether a text is taken as if it began with a blank."""
        backend, text = self.tokenizer.backend_tokenizer, "x"
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        if backend.pre_tokenizer is not None:
            text = "".join(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text))
        return bool(text.startswith(SPACE))

    def _pre(self) -> str:
        own = self.tokenizer.backend_tokenizer.pre_tokenizer
        cut = [[piece for piece, _ in own.pre_tokenize_str(text)] for text in _PROBES]
        fitting = [(name, pre) for name, pre in PRE_TOKENIZERS.items() if [cut_by(pre, t) for t in _PROBES] == cut]
        if not fitting:
            what = "the tokenizer cuts text in a way that llama.cpp has no name for (tokenizer.ggml.pre)"
            raise CheckpointError(what, where=self.where, hint="any name would quietly give worse text")
        return max(fitting, key=lambda found: self._likeness(found[1]))[0]

    def _likeness(self, pre: Pre) -> int:
        """Beyond where it cuts: how text is normalized, whether words are taken whole, whether BOS begins."""
        normalizer = (self.document.get("normalizer") or {}).get("type")
        same = (pre.normalizer == normalizer, pre.ignore_merges == bool(self.parts.get("ignore_merges")))
        return 4 * same[1] + 2 * same[0] + (pre.add_bos == self._around()[0])

    def _around(self) -> tuple[bool, bool]:
        """Whether BOS and EOS are put around a text."""
        ids = self.tokenizer("x")["input_ids"]
        plain = self.tokenizer("x", add_special_tokens=False)["input_ids"]
        more = ids if ids != plain else []
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return bool(more and bos is not None and more[0] == bos), bool(more and eos is not None and more[-1] == eos)

    def roles(self, ends: Any) -> dict[str, Any]:
        """Tokens that begin, end, pad ... a text.

        Args:
            ends: `eos_token_id` of the generation config: a number, several, or None.
        """
        t = self.tokenizer
        found = {"bos": t.bos_token_id, "eos": t.eos_token_id, "unknown": t.unk_token_id, "padding": t.pad_token_id}
        stops = [ends] if isinstance(ends, int) else list(ends or ())
        if found["eos"] is None and stops:
            found["eos"] = stops[0]
        others = [stop for stop in stops if stop != found["eos"]]
        message = [stop for stop in others if "eom" in self.tokens.get(stop, "")]
        turn = [stop for stop in others if stop not in message]
        found |= {"eot": turn[0] if turn else None, "eom": message[0] if message else None}
        ids = {
            f"tokenizer.ggml.{role}_token_id": index
            for role, index in found.items()
            if index is not None and 0 <= index < self.rows
        }
        bos, eos = self._around()
        return {**ids, "tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}


def _templates(template: Any) -> dict[str, Any]:
    if not template:
        return {}
    if isinstance(template, str):
        return {TEMPLATE: template}
    named = {name: text for name, text in template.items() if name != "default"}
    found = {TEMPLATE: template["default"]} if "default" in template else {}
    found |= {f"{TEMPLATE}.{name}": text for name, text in named.items()}
    return {**found, **({"tokenizer.chat_templates": list(named)} if named else {})}
