"""A model run without values: shapes come out as they are, and what would not run is told before it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import bitfold
import tiny_lm
from bitfold.checkpoints.schema import Entry
from bitfold.formats import get_format
from bitfold.models import skeleton
from bitfold.models.dry_run import run_dry
from bitfold.models.rehearsal import rehearse
from bitfold.models.sites import find_sites
from model_zoo import ZOO

SMALL: dict[str, Any] = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "intermediate_size": 64}
# Families that use their weights in ways of their own: transposed, from the left, in lists, scaled in place.
OWN_WAYS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "falcon": ("FalconForCausalLM", "FalconConfig", {**SMALL, "num_attention_heads": 4}),
    "rwkv": ("RwkvForCausalLM", "RwkvConfig", {**SMALL, "num_hidden_layers": 7, "attention_hidden_size": 64}),
    "mamba": ("MambaForCausalLM", "MambaConfig", {**SMALL, "state_size": 8}),
    "mamba2": (
        "Mamba2ForCausalLM", "Mamba2Config",
        {**SMALL, "num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    ),
    "mobilebert": (
        "MobileBertForMaskedLM", "MobileBertConfig",
        {**SMALL, "intermediate_size": 64, "embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32},
    ),
    "deberta": ("DebertaV2ForMaskedLM", "DebertaV2Config", {**SMALL, **HEADS}),
    "bart": (
        "BartForConditionalGeneration", "BartConfig",
        {"vocab_size": 99, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    ),
    "xlnet": (
        "XLNetLMHeadModel", "XLNetConfig", {"vocab_size": 99, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96},
    ),
}  # fmt: skip


def built(name: str, device: str = "meta") -> Any:
    cls, config, options = OWN_WAYS[name]
    made = getattr(hf, config)(**options)
    if device == "meta":
        return skeleton.build(getattr(hf, cls), made)
    torch.manual_seed(0)
    return getattr(hf, cls)(made).eval()


def entries(model: nn.Module) -> dict[str, Entry]:
    """Everything quantized that can be."""
    found = get_format("int8")
    return {site.tensor: Entry(found, site.qshape, "float", site.transposed, None) for site in find_sites(model)}


@pytest.mark.parametrize("name", OWN_WAYS)
def test_families_with_ways_of_their_own(name: str) -> None:
    """They run dry as they are and quantized, and then really."""
    model = built(name)
    assert run_dry(model).logits.shape == (1, 4, 99)
    assert rehearse(model, entries(model)) is None
    assert all(p.is_meta for p in model.parameters())
    real = built(name, "cpu")
    ids = {"input_ids": torch.arange(9)[None]}
    with torch.no_grad():
        wanted = real(**ids).logits
        again = built(name, "cpu")
        bitfold.quantize_(again, bitfold.Recipe((bitfold.Rule("*", "int8"),)))
        assert (again(**ids).logits - wanted).norm() <= 0.1 * wanted.norm()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral", "gpt-oss", "bert-masked", "t5"])
def test_the_zoo_runs_dry(name: str) -> None:
    """A model in memory is left as it was: weights, attributes, config."""
    model: Any = ZOO[name].build()
    before, config = {k: v.clone() for k, v in model.state_dict().items()}, model.config.to_dict()
    out = run_dry(model)
    assert out.logits.shape == (1, 4, 99)
    assert not out.logits.is_meta
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.config.to_dict() == config


class Writing(hf.LlamaForCausalLM):
    """Does to a weight what cannot be done to codes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            self.model.layers[0].mlp.up_proj.weight.add_(1)
        return super().forward(*args, **kwargs)


def test_what_would_not_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_lm.folder(tmp_path / "m", tiny_lm.model())
    assert bitfold.quantize(folder, tmp_path / "q", format="int8", dry_run=True).preflight["rehearsal"] is None
    monkeypatch.setattr(skeleton, "model_class", lambda _config: Writing)
    told = bitfold.quantize(folder, tmp_path / "q", format="int8", dry_run=True).preflight["rehearsal"]
    assert told.startswith("the quantized model would not run: add_ would write into a quantized weight")
    kept = bitfold.quantize(folder, tmp_path / "q", format="int8", ignore=["*up_proj*"], dry_run=True)
    assert kept.preflight["rehearsal"] is None


class Odd(hf.LlamaForCausalLM):
    """Cannot be run at all without values."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.lm_head.weight.sum() > 0:
            raise ValueError("odd")
        return super().forward(*args, **kwargs)


def test_where_the_original_cannot_be_rehearsed_nothing_is_said() -> None:
    model = skeleton.build(Odd, tiny_lm.model().config)
    assert rehearse(model, entries(model)) is None
