"""Which tensor gets which type: what `llama-quantize --dry-run` prints for a model of 30 layers, three query heads to
one of keys, tied, given an importance matrix; rows that 256 divides stand for what it asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bitfold
from bitfold.checkpoints import open_source
from bitfold.checkpoints.gguf.file import GgufFile
from bitfold.checkpoints.gguf.mixtures import Facts, Typed, names, typed
from bitfold.checkpoints.repack import repack
from gguf_families import random_model, rebuilt

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


@pytest.mark.filterwarnings("ignore:.*has no tokenizer")
def test_files_of_vector_types_run_and_are_quantized_from(tmp_path: Path) -> None:
    options = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    random_model("llama", options).save_pretrained(tmp_path / "model")
    path = Path(repack(tmp_path / "model", tmp_path / "m.gguf", "gguf:IQ2_M").path)
    file = GgufFile(path)
    assert {t.type for t in file.tensors.values()} >= {"iq2_s", "iq3_s"}
    file.close()
    ids = torch.tensor([[3, 4, 5, 6]])
    source = open_source(path)
    with torch.no_grad():
        expected = rebuilt(source).eval()(input_ids=ids).logits
        found = bitfold.load(path, dtype=torch.float32)(input_ids=ids).logits
    assert (found - expected).norm() < 2e-3 * expected.norm()
    name = "model.layers.0.mlp.up_proj.weight"
    before = source.read(name)
    source.close()
    bitfold.quantize(path, tmp_path / "from", format="int8-g64", method="rtn")
    again = open_source(tmp_path / "from").read(name)
    assert (again - before).norm() < 0.02 * before.norm()
