"""Which tensor of a GGUF file gets which ggml type: llama.cpp's mixtures by name, and what rows that do not divide get.

`Q4_K_M` is no format but a mixture: most tensors Q4_K, those that errors hurt most more bits. The rules are those that
llama.cpp documents and applies (llama-quant.cpp), so that files of one name are of one size whoever made them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bitfold.checkpoints.gguf.file import GGML_TYPES
from bitfold.errors import UsageError
from bitfold.formats.families.ggml import writable

PLAIN_TYPES = ("f32", "f16", "bf16")
_BLOCK = {name: weights for name, weights, _ in GGML_TYPES.values()}
# The type of most tensors of a mixture, where its name is not that of a type.
_BASE = {
    **{"Q2_K_S": "q2_k", "Q3_K_S": "q3_k", "Q3_K_M": "q3_k", "Q3_K_L": "q3_k", "Q4_K_S": "q4_k", "Q4_K_M": "q4_k"},
    **{"Q5_K_S": "q5_k", "Q5_K_M": "q5_k"},
    # IQ2_S is the name of a type as well: llama.cpp takes the next smaller one for most tensors of such files.
    **{"IQ2_S": "iq2_xs", "IQ2_M": "iq2_s", "IQ3_XS": "iq3_s", "IQ3_M": "iq3_s"},
}
# What a row gets that blocks of 256 do not divide.
_SMALLER = {
    **{"q2_k": "q4_0", "q3_k": "q4_0", "tq2_0": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"},
    **dict.fromkeys(("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"),
}
# Mixtures of 2 bits, whose other tensors are a little larger, and those of them that have more of these.
_TWO_BITS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
_TWO_AND_MORE = _TWO_BITS[2:]
_LARGE_MODEL = 80  # layers of 70B models, eight query heads to one of keys


@dataclass(frozen=True)
class Facts:
    """What mixtures go by.

    Args:
        layers: of the model.
        shared: query heads to each of keys and values.
        experts: of a layer; 0 = it has none.
        tied: the embedding is the output head as well.
    """

    layers: int
    shared: int
    experts: int
    tied: bool

    def more(self, layer: int) -> bool:
        """Layers that get more bits: the first and last eighth, and every third between."""
        eighth = self.layers // 8
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2


@dataclass(frozen=True)
class Typed:
    """The type of a tensor.

    Args:
        type: of ggml.
        instead_of: what its mixture wants, where its rows cannot have that.
    """

    type: str
    instead_of: str | None = None


def names() -> list[str]:
    """Of all mixtures and types that can be written."""
    types = [*PLAIN_TYPES, *(t for t in writable() if t != "ggml_mxfp4")]
    return list(dict.fromkeys([*(t.upper() for t in types), *_BASE]))


def base_type(name: str) -> str:
    """The type of most tensors of a mixture.

    Raises:
        UsageError: there is no such mixture.
    """
    known = {n.upper(): n for n in names()}
    if name.upper() not in known:
        raise UsageError(f"unknown type of GGUF {name!r}", hint=f"one of {', '.join(sorted(known))}")
    return _BASE.get(name.upper(), name.lower())


def typed(name: str, tensor: str, shape: tuple[int, ...], facts: Facts) -> Typed:
    """The type of a tensor in a mixture.

    Args:
        name: of the mixture (`Q4_K_M`), or a type.
        tensor: its name in GGUF.
        shape: rows first.
        facts: of the model.
    """
    base = base_type(name)
    if not quantizable(tensor, shape):
        return Typed("f32")
    if base in PLAIN_TYPES:
        return Typed(base)
    part = tensor.removesuffix(".weight").rpartition(".")[2]
    if part == "output" or (facts.tied and part == "token_embd"):
        return fitting(_head(name.upper(), base, shape[-1]), shape[-1])
    layer = int(tensor.split(".")[1]) if tensor.startswith("blk.") else 0
    rule = _RULES.get(_KINDS.get(part, part))
    wanted = None if rule is None else rule(name.upper(), layer, facts)
    return fitting(wanted or base, shape[-1])


def quantizable(tensor: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp takes a tensor as anything but float32: matrices, but for those that choose experts."""
    return len(shape) >= 2 and tensor.endswith(".weight") and "_norm." not in tensor and "ffn_gate_inp" not in tensor


def fitting(type: str, columns: int) -> Typed:
    """The type, or what llama.cpp takes for rows that its blocks do not divide."""
    if columns % _BLOCK[type] == 0:
        return Typed(type)
    smaller = _SMALLER.get(type, type)
    return Typed(smaller if columns % _BLOCK[smaller] == 0 else "f16", type)


def _head(name: str, base: str, columns: int) -> str:
    """Of the output head, and of the embedding where it is the same."""
    if columns % _BLOCK[base] == 0 and name in (*_TWO_BITS, "IQ3_XXS"):
        return "q5_k"
    return "q8_0" if base == "q8_0" or columns % _BLOCK[base] else "q6_k"


def _embedding(name: str, layer: int, facts: Facts) -> str | None:
    """token_embd, where it is not the head."""
    small = name in _TWO_BITS and name not in _TWO_AND_MORE
    return "q2_k" if small else "iq3_s" if name in (*_TWO_AND_MORE, "IQ3_XXS") else None


def _values(name: str, layer: int, facts: Facts) -> str | None:
    """attn_v: small, and errors in it are not averaged away."""
    if name in _TWO_BITS:
        more = facts.shared >= 4 or facts.experts >= 4
        return "q4_k" if more else "iq3_s" if name in _TWO_AND_MORE else "q2_k"
    if facts.experts == 8:
        return "q8_0"
    many = facts.shared >= 4
    wanted = {
        "Q2_K": "q4_k" if many else "q3_k",
        "Q2_K_S": "q4_k" if many else None,
        "Q3_K_M": "q5_k" if layer < 2 else "q4_k",
        "Q3_K_L": "q5_k",
        "Q4_K_S": "q5_k" if layer < 4 else None,
        "Q4_K_M": "q6_k" if facts.more(layer) else None,
        "Q5_K_M": "q6_k" if facts.more(layer) else None,
        "IQ4_NL": "q5_k" if many else None,
        "IQ4_XS": "q5_k" if many else None,
        **dict.fromkeys(("IQ3_XXS", "IQ3_XS", "IQ3_S"), "q4_k" if many else None),
        "IQ3_M": "q4_k",
    }.get(name)
    if facts.layers == _LARGE_MODEL and facts.shared > 1 and (wanted or base_type(name)) in ("q3_k", "q4_k"):
        return "q5_k"
    return wanted


def _down(name: str, layer: int, facts: Facts) -> str | None:
    """ffn_down: its inputs have outliers."""
    first = layer < facts.layers // 8
    return {
        **dict.fromkeys(_TWO_BITS, "q2_k" if first else None),
        **dict.fromkeys(_TWO_AND_MORE, "iq3_s" if first else None),
        "IQ3_M": "q4_k" if first or (facts.experts == 8 and facts.more(layer)) else None,
        "Q2_K": "q3_k",
        "Q2_K_S": "q4_k" if first else None,
        "Q3_K_M": "q5_k" if layer < facts.layers // 16 else "q4_k",
        "Q3_K_L": "q5_k",
        "Q4_K_S": "q5_k" if first else None,
        "Q4_K_M": "q6_k" if facts.more(layer) else None,
        "Q5_K_M": "q6_k" if facts.more(layer) else None,
        # With data, as bitfold has by default: a guard of the first layers.
        "Q4_0": "q4_1" if first else None,
        "Q5_0": "q5_1" if first else None,
    }.get(name)


def _attention_output(name: str, layer: int, facts: Facts) -> str | None:
    if facts.experts == 8:
        five = (
            "Q2_K",
            "Q3_K_S",
            "Q3_K_M",
            "Q4_K_S",
            "Q4_K_M",
            "IQ4_NL",
            "IQ4_XS",
            "IQ3_XXS",
            "IQ3_XS",
            "IQ3_S",
            "IQ3_M",
        )
        return "q5_k" if name in (*five, *_TWO_BITS) else None
    more = dict.fromkeys((*_TWO_AND_MORE, "IQ3_XXS"), "iq3_s")
    return {"Q2_K": "q3_k", "Q3_K_M": "q4_k", "Q3_K_L": "q5_k", "IQ3_M": "q4_k", **more}.get(name)


def _queries(name: str, layer: int, facts: Facts) -> str | None:
    return {"IQ3_XS": "iq3_xxs", "IQ3_XXS": "iq2_s"}.get(name)


def _keys(name: str, layer: int, facts: Facts) -> str | None:
    if facts.experts == 8:
        return "q4_k" if name in _TWO_BITS else "q8_0"
    return _queries(name, layer, facts)


def _up(name: str, layer: int, facts: Facts) -> str | None:
    """ffn_gate and ffn_up."""
    middle = facts.layers // 8 <= layer < 7 * facts.layers // 8
    return "iq3_xxs" if name == "IQ3_XS" and middle else None


_KINDS = {"ffn_down_exps": "ffn_down", "ffn_gate_exps": "ffn_gate", "ffn_up_exps": "ffn_up"}
_RULES: Mapping[str, Callable[[str, int, Facts], str | None]] = {
    "token_embd": _embedding,
    "attn_q": _queries,
    "attn_v": _values,
    "attn_k": _keys,
    "attn_qkv": _values,
    "ffn_down": _down,
    "attn_output": _attention_output,
    "ffn_gate": _up,
    "ffn_up": _up,
}
