"""Which tensor gets which type: what `llama-quantize --dry-run` prints for a model of 30 layers, three query heads to
one of keys, tied, given an importance matrix; rows that 256 divides stand for what it asks for."""

from __future__ import annotations

import pytest

from bitfold.checkpoints.gguf.mixtures import Facts, Typed, names, typed

FACTS = Facts(layers=30, shared=3, experts=0, tied=True)
# head; queries, values, output of attention; gate in the middle; down of layer 0, of layer 10.
PRINTED = {
    "IQ2_XXS": ("q5_k", "iq2_xxs", "q2_k", "iq2_xxs", "iq2_xxs", "q2_k", "iq2_xxs"),
    "IQ2_XS": ("q5_k", "iq2_xs", "q2_k", "iq2_xs", "iq2_xs", "q2_k", "iq2_xs"),
    "IQ2_S": ("q5_k", "iq2_xs", "iq3_s", "iq3_s", "iq2_xs", "iq3_s", "iq2_xs"),
    "IQ2_M": ("q5_k", "iq2_s", "iq3_s", "iq3_s", "iq2_s", "iq3_s", "iq2_s"),
    "IQ3_XXS": ("q5_k", "iq2_s", "iq3_xxs", "iq3_s", "iq3_xxs", "iq3_xxs", "iq3_xxs"),
    "IQ3_XS": ("q6_k", "iq3_xxs", "iq3_s", "iq3_s", "iq3_xxs", "iq3_s", "iq3_s"),
    "IQ3_S": ("q6_k", "iq3_s", "iq3_s", "iq3_s", "iq3_s", "iq3_s", "iq3_s"),
    "IQ3_M": ("q6_k", "iq3_s", "q4_k", "q4_k", "iq3_s", "q4_k", "iq3_s"),
}
PLACES = ("attn_q", "attn_v", "attn_output", "ffn_gate")


@pytest.mark.parametrize("name", PRINTED)
def test_vector_mixtures_are_llama_cpps(name: str) -> None:
    places = ["token_embd", *(f"blk.10.{place}" for place in PLACES), "blk.0.ffn_down", "blk.10.ffn_down"]
    assert tuple(typed(name, f"{place}.weight", (256, 512), FACTS).type for place in places) == PRINTED[name]
    assert name in names()


def test_where_the_embedding_is_not_the_head() -> None:
    facts = Facts(layers=24, shared=7, experts=0, tied=False)
    found = {name: typed(name, "token_embd.weight", (256, 512), facts).type for name in PRINTED}
    small = {"IQ2_XXS": "q2_k", "IQ2_XS": "q2_k"}
    assert found == {name: small.get(name, "iq3_s") for name in PRINTED}
    assert typed("IQ3_XXS", "blk.3.attn_v.weight", (256, 512), facts).type == "q4_k"


def test_rows_that_do_not_divide() -> None:
    assert typed("IQ3_XXS", "blk.3.attn_q.weight", (256, 576), FACTS) == Typed("iq4_nl", "iq2_s")
    assert typed("IQ3_XXS", "token_embd.weight", (256, 576), FACTS) == Typed("q8_0")


def test_names_come_once() -> None:
    assert len(set(names())) == len(names())
