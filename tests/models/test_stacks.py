"""The axis of the inputs of stacked experts: square ones, where no shape tells, and outputs that tell in the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import bitfold
from bitfold.models import skeleton
from bitfold.models.sites import EXPERTS, find_sites
from bitfold.models.stacks import find_stacks
from model_zoo import outputs

SQUARE: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
EXPERT: dict[str, Any] = {**SQUARE, "intermediate_size": 64, "num_experts_per_tok": 2}
# Class, config, whether the experts are held as (experts, inputs, outputs).
FAMILIES: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "llama4": (
        "Llama4ForCausalLM", "Llama4TextConfig",
        {**SQUARE, "intermediate_size": 64, "head_dim": 16, "intermediate_size_mlp": 64, "num_local_experts": 4,
         "moe_layers": [1]}, True,
    ),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {**EXPERT, "num_local_experts": 4, "head_dim": 16}, True),
    "aria": ("AriaTextForCausalLM", "AriaTextConfig", {**SQUARE, "intermediate_size": 64, "moe_num_experts": 4}, True),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**EXPERT, "num_local_experts": 4}, False),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
        {**EXPERT, "num_experts": 4, "moe_intermediate_size": 64, "head_dim": 16}, False,
    ),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", {**EXPERT, "num_local_experts": 4}, False),
    "granite-moe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {**EXPERT, "num_local_experts": 4}, False),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**EXPERT, "num_experts": 4}, False),
    "jamba": (
        "JambaForCausalLM", "JambaConfig",
        {**EXPERT, "num_experts": 4, "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1,
         "expert_layer_period": 2, "mamba_d_state": 4, "mamba_dt_rank": 8}, False,
    ),
    "jetmoe": (
        "JetMoeForCausalLM", "JetMoeConfig",
        {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 4, "kv_channels": 16,
         "intermediate_size": 32, "num_local_experts": 4}, False,
    ),
}  # fmt: skip
families = pytest.mark.parametrize("name", FAMILIES)


def built(name: str) -> nn.Module:
    cls, config, options, _ = FAMILIES[name]
    torch.manual_seed(0)
    model: nn.Module = getattr(hf, cls)(getattr(hf, config)(**options)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 3:
            torch.nn.init.normal_(parameter, std=0.1)  # some families leave them as they were in memory
    return model


@families
def test_axis(name: str) -> None:
    """Of a skeleton, and of a model in memory."""
    cls, config, options, second = FAMILIES[name]
    for model in (skeleton.build(getattr(hf, cls), getattr(hf, config)(**options)), built(name)):
        stacks = [site for site in find_sites(model) if site.kind == EXPERTS]
        assert stacks
        assert {site.transposed for site in stacks} == {second}
        assert find_stacks(model).keys() == {site.tensor for site in stacks}


@families
def test_scales_run_along_the_inputs(name: str, tmp_path: Path) -> None:
    """An output twenty times larger than the others has a scale of its own, and costs the others nothing."""
    model = built(name)
    sites = {site.tensor: site for site in find_sites(model) if site.kind == EXPERTS}
    for tensor, site in sites.items():
        w = model.get_parameter(tensor).data
        (w.mT if site.transposed else w)[:, 0] *= 20
    inputs = {"input_ids": torch.arange(9)[None]}
    wanted = outputs(model, inputs)
    model.save_pretrained(tmp_path / "m")  # type: ignore[operator]
    bitfold.quantize(tmp_path / "m", tmp_path / "q", format="int8", fit="absmax")
    loaded = bitfold.load(tmp_path / "q")
    for tensor, site in sites.items():
        found = loaded.get_submodule(tensor)
        assert tuple(found.qshape) == site.qshape
        w = model.get_parameter(tensor).detach()
        step = w.abs().amax(-2 if site.transposed else -1, keepdim=True) / 127
        assert ((found.dequantize() - w).abs() <= 0.6 * step).all()
    for a, b in zip(outputs(loaded, inputs), wanted, strict=True):
        assert (a - b).norm() <= 0.3 * b.norm()  # a token may be sent elsewhere


class PlainExperts(nn.Module):
    """Of no family."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 64, 64))


def test_what_cannot_be_run_is_taken_as_outputs_first() -> None:
    assert find_stacks(nn.Sequential(PlainExperts())) == {}
    (site,) = find_sites(nn.Sequential(PlainExperts()))
    assert not site.transposed
