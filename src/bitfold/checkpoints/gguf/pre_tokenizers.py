"""How byte-level BPE cuts text into words before merging: the rules behind the names in `tokenizer.ggml.pre`.

GGUF stores the *name* of a pre-tokenizer; the cutting itself lives in the reader. The patterns are those of the models'
own tokenizers (tokenizer.json on the Hub), the names those that llama.cpp's converter gives them. A wrong rule still
gives plausible tokens and quietly worse text (SmolLM's digits are the known case). So where a name is not known, the
vocabulary is asked: its tokens were made under the model's own rule, which therefore never cuts one of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}{_GPT4_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{_GPT4_TAIL}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_SPACES}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _camel(contractions: str, digits: str) -> str:
    """Words that end where lower case turns into upper case (Tekken, GPT-4o)."""
    first = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{contractions}"
    second = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{contractions}"
    return rf"{first}|{second}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACES}"


_TEKKEN = _camel("", r"\p{N}")
_GPT4O = _camel(f"{_CONTRACTIONS}?", r"\p{N}{1,3}")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CHINESE_JAPANESE = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_PUNCTUATED = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
_DEEPSEEK3 = (r"\p{N}{1,3}", _CHINESE_JAPANESE, _PUNCTUATED + r"| ?[\p{P}\p{S}]+[\r\n]*" + _SPACES)
_CHINESE_KOREAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
# Letters of DeepSeek's first tokenizer: cased ones, as the Unicode of its day had them.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)


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

    def steps(self) -> list[dict[str, Any]]:
        """The pre-tokenizers of a tokenizer.json, in order; the last one turns text into byte letters."""
        return [*map(_split, self.splits), {**BYTE_LEVEL, "use_regex": self.gpt2_rule}]


BYTE_LEVEL: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def _split(pattern: str) -> dict[str, Any]:
    if pattern == "digits":
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_STYLES: dict[Pre, tuple[str, ...]] = {
    Pre(gpt2_rule=True): (
        *("gpt-2", "gpt2", "phi-2", "olmo", "mpt", "jais", "trillion", "granite-docling", "exaone4", "gigachat"),
        *("jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum", "modern-bert"),
        *("jina-v1-en", "jina-v2-code", "roberta-bpe"),
    ),
    Pre(("digits",), gpt2_rule=True): (
        *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    ),
    Pre((_LLAMA3,), ignore_merges=True, add_bos=True): (
        *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    ),
    Pre((_LLAMA3,)): ("dbrx", "smaug-bpe", "chatglm-bpe"),
    Pre((_LLAMA3,), ignore_merges=True): ("glm4", "glm5"),
    Pre((_QWEN2,), normalizer="NFC"): ("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2"),
    Pre((_QWEN2,)): ("stablelm2", "hunyuan", "solar-open", "grok-2"),
    Pre((_QWEN35,), normalizer="NFC"): ("qwen35",),
    Pre((_TEKKEN,), ignore_merges=True, add_bos=True): ("tekken",),
    Pre((_GPT4O,)): ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
    Pre((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)): ("tiny_aya", "cohere2moe"),
    Pre(_DEEPSEEK3): ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"),
    Pre((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE_KOREAN, "digits")): ("deepseek-coder",),
    Pre(
        (
            r"[\r\n]",
            rf"\s?[{_CASED}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _CHINESE_KOREAN,
            r"\p{N}+",
        )
    ): ("deepseek-llm",),
    Pre((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")): ("falcon",),
    Pre((_BLOOM,)): ("bloom", "poro-chat", "gpt3-finnish"),
    Pre((_BLOOM, "digits")): ("viking",),
    Pre((r"\p{N}+", r"(?=(\d{3})+(?!\d))")): ("superbpe",),
    Pre(
        (rf"'(?i:[sdmt]|ll|ve|re)|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",),
    ): ("bailingmoe", "bailingmoe2", "llada-moe"),
    Pre((rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+{_SPACES}",)): ("seed-coder",),
    Pre((r"\p{N}{1,3}", rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}+{_GPT4_TAIL}"), ignore_merges=True): ("minicpm5",),
    # llama.cpp's own rule for files that name no model's: it is what such files were made and judged with.
    Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")): ("default",),
}
PRE_TOKENIZERS: dict[str, Pre] = {name: pre for pre, names in _STYLES.items() for name in names}
# One of each style that many models share; the first is taken where the vocabulary says nothing.
USUAL = ("gpt-2", "smollm", "llama-bpe", "qwen2", "gpt-4o", "tekken")
_ASKED = 20_000  # tokens of the vocabulary that are tried, evenly spread
_TELLING = 500  # fewer say nothing
_NOISE = 0.002  # share of tokens that their own rule may cut: added by hand, say
_FEW = 0.002  # share of the vocabulary that numbers have at least where digits are left together
_PROBE = (
    "In 1987, 12345.67 people of camelCase weren't there: we'LL see setTimeout(getElementById, 100) of /lib/DNSServer"
    "\n\n  return foo_bar\t\t...!!! \n"
)


def nearest(tokens: Sequence[str]) -> str:
    """Name of the usual pre-tokenizer under which a byte-level vocabulary can have come about.

    Of the rules that cut (next to) none of its tokens, the one that cuts most elsewhere: each token is there because
    the rule left its letters together. ASCII alone is asked: Qwen's vocabulary, for one, was not made under the rule
    that its tokenizer has for letters with marks.

    Args:
        tokens: of the vocabulary, in byte letters, special ones left out.
    """
    words = [w for t in tokens if (w := _text(t)) is not None and len(w) > 1 and w.isascii()]
    if len(words) < _TELLING:
        return USUAL[0]
    joined = sum(w.isdecimal() for w in words) > _FEW * len(words)
    rules = {name: _cutter(PRE_TOKENIZERS[name]) for name in USUAL}
    rules = {name: rule for name, rule in rules.items() if joined == (len(rule("12")) == 1)}
    asked = words[:: -(-len(words) // _ASKED)]
    cut = {name: sum(len(rule(word)) > 1 for word in asked) for name, rule in rules.items()}
    likely = [name for name in rules if cut[name] <= min(cut.values()) + _NOISE * len(asked)]
    return max(likely, key=lambda name: len(rules[name](_PROBE)))


def guessed(tokens: Iterable[str]) -> tuple[str, Pre]:
    """`nearest` by name and rule; whether BOS begins a text is left to the file."""
    name = nearest(list(tokens))
    return name, replace(PRE_TOKENIZERS[name], add_bos=False)


def cut_by(pre: Pre, text: str) -> list[str]:
    """The words that a rule makes of a text, in byte letters."""
    return [word for word, _ in _cutter(pre)(text)]


@cache
def _cutter(pre: Pre) -> Any:
    from tokenizers import Tokenizer

    steps = {"type": "Sequence", "pretokenizers": pre.steps()}
    model = {"type": "BPE", "vocab": {}, "merges": []}
    return Tokenizer.from_str(json.dumps({"pre_tokenizer": steps, "model": model})).pre_tokenizer.pre_tokenize_str


def byte_letters() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTES = byte_letters()


def _text(token: str) -> str | None:
    """What a token in byte letters says; None for a piece of a character, and for what is no byte letters."""
    try:
        return bytes(_BYTES[c] for c in token).decode()
    except (KeyError, UnicodeDecodeError):
        return None
