"""Architectures as declarations: what the native engine must know of a family of decoders beyond its config.

A family is one entry of `FAMILIES` and a comparison with transformers (tests/engine/): its norms and where they are,
the names of its projections, what its config calls the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Config = Any


@dataclass(frozen=True)
class Mixture:
    """Experts in place of an MLP, those that a router chooses; a layer whose `mlp` has none of them is an ordinary one.

    The experts' weights are stacks (experts, rows, columns): `gate_up_proj`, both halves in its rows, and `down_proj`.

    Args:
        top: how many of them a token goes through.
        norm: the probabilities of these are scaled so that they sum up to 1.
        router, experts: names in the `mlp` of a layer.
        shared, shared_gate: an expert that every token goes through, times the sigmoid of a product with that row.
    """

    top: Callable[[Config], int] = lambda config: int(config.num_experts_per_tok)
    norm: Callable[[Config], bool] = lambda config: bool(config.norm_topk_prob)
    router: str = "gate"
    experts: str = "experts"
    shared: str | None = None
    shared_gate: str | None = None


@dataclass(frozen=True)
class Family:
    """One architecture.

    Args:
        qkv, gate_up: names of the projections that share an input, in the order of their rows; one name: fused.
        before_attention, after_attention, before_mlp, after_mlp: names of the norms of a layer; None: there is none.
        head_norms: queries and keys are normed, by `q_norm` and `k_norm`.
        whole_norm: over all heads together, not each by itself.
        one_plus: a norm multiplies by one plus its weight.
        mixture: where layers have experts.
        embedding_scale, residual, logit_scale: factors that the config asks for.
    """

    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    head_norms: bool = False
    whole_norm: bool = False
    one_plus: bool = False
    mixture: Mixture | None = None
    embedding_scale: Callable[[Config], float] = lambda config: 1.0
    residual: Callable[[Config], float] = lambda config: 1.0
    logit_scale: Callable[[Config], float] = lambda config: 1.0


_SANDWICH = {
    "after_attention": "post_attention_layernorm",
    "before_mlp": "pre_feedforward_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}


def _width(config: Config) -> float:
    return float(config.hidden_size**0.5)


# By the name of transformers' class.
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(),
    "MinistralForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(),
    "Qwen3ForCausalLM": Family(head_norms=True),
    "MixtralForCausalLM": Family(mixture=Mixture(norm=lambda config: True)),
    "Qwen2MoeForCausalLM": Family(mixture=Mixture(shared="shared_expert", shared_gate="shared_expert_gate")),
    "Qwen3MoeForCausalLM": Family(head_norms=True, mixture=Mixture()),
    "Gemma2ForCausalLM": Family(**_SANDWICH, one_plus=True, embedding_scale=_width),  # type: ignore[arg-type]
    "Gemma3ForCausalLM": Family(**_SANDWICH, head_norms=True, one_plus=True, embedding_scale=_width),  # type: ignore[arg-type]
    "Phi3ForCausalLM": Family(qkv=("qkv_proj",), gate_up=("gate_up_proj",)),
    "GraniteForCausalLM": Family(
        embedding_scale=lambda config: float(config.embedding_multiplier),
        residual=lambda config: float(config.residual_multiplier),
        logit_scale=lambda config: 1 / float(config.logits_scaling),
    ),
    "Olmo2ForCausalLM": Family(
        before_attention=None,
        after_attention="post_attention_layernorm",
        before_mlp=None,
        after_mlp="post_feedforward_layernorm",
        head_norms=True,
        whole_norm=True,
    ),
}
