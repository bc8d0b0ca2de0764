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
        model_type: what its config is called.
        qkv, gate_up: names of the projections that share an input, in the order of their rows; one name: fused.
        before_attention, after_attention, before_mlp, after_mlp: names of the norms of a layer; None: there is none.
        head_norms: queries and keys are normed, by `q_norm` and `k_norm`.
        whole_norm: over all heads together, not each by itself.
        one_plus: a norm multiplies by one plus its weight.
        mixture: where layers have experts.
        embedding_scale, residual, logit_scale, score_scale: factors that the config asks for.
        biases: names of the projections that have one.
        kinds: of each layer which tokens it sees, where the config does not say it by itself; None: all layers alike.
        tied: the head is the embedding, where the config is silent.
        needs: entries of its config that are not to be guessed, beyond `bare.NEEDED`.
    """

    model_type: str
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
    score_scale: Callable[[Config], float] = lambda config: float(config.head_dim**-0.5)
    biases: Callable[[Config], tuple[str, ...]] = lambda config: ()
    kinds: Callable[[Config], list[str]] | None = None
    tied: bool = False
    needs: tuple[str, ...] = ()


def _width(config: Config) -> float:
    return float(config.hidden_size**0.5)


def _asked(config: Config) -> tuple[str, ...]:
    """Biases that a config may ask for."""
    attention = ("q_proj", "k_proj", "v_proj", "o_proj") if getattr(config, "attention_bias", False) else ()
    return (*attention, *(("gate_proj", "up_proj", "down_proj") if getattr(config, "mlp_bias", False) else ()))


def _kinds(local: Callable[[Config, int], bool]) -> Callable[[Config], list[str]]:
    def kinds(config: Config) -> list[str]:
        layers = range(config.num_hidden_layers)
        return ["sliding_attention" if local(config, i) else "full_attention" for i in layers]

    return kinds


def _behind(config: Config, layer: int) -> bool:
    """Qwen's first layers see all, and the others a window, where there is one."""
    return bool(getattr(config, "use_sliding_window", False)) and layer >= config.max_window_layers


_SANDWICH: dict[str, Any] = {
    "after_attention": "post_attention_layernorm",
    "before_mlp": "pre_feedforward_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}
_GEMMA: dict[str, Any] = {
    **_SANDWICH,
    "one_plus": True,
    "embedding_scale": _width,
    "score_scale": lambda config: float(config.query_pre_attn_scalar**-0.5),
    "biases": _asked,
    "tied": True,
}
_GEMMA_NEEDS = ("query_pre_attn_scalar", "sliding_window", "head_dim")
_QWEN2: dict[str, Any] = {"biases": lambda config: ("q_proj", "k_proj", "v_proj"), "kinds": _kinds(_behind)}
_GRANITE = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")

# By the name of transformers' class.
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", biases=_asked),
    "MistralForCausalLM": Family("mistral", needs=("sliding_window",)),
    "MinistralForCausalLM": Family(
        "ministral", kinds=_kinds(lambda config, _: config.sliding_window is not None), needs=("sliding_window",)
    ),
    "Qwen2ForCausalLM": Family("qwen2", **_QWEN2),
    "Qwen3ForCausalLM": Family("qwen3", head_norms=True, biases=_asked, kinds=_kinds(_behind), needs=("head_dim",)),
    "MixtralForCausalLM": Family("mixtral", mixture=Mixture(norm=lambda config: True)),
    "Qwen2MoeForCausalLM": Family(
        "qwen2_moe", mixture=Mixture(shared="shared_expert", shared_gate="shared_expert_gate")
    ),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", head_norms=True, mixture=Mixture()),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        **_GEMMA,
        kinds=_kinds(lambda config, layer: layer % 2 == 0),
        needs=(*_GEMMA_NEEDS, "attn_logit_softcapping", "final_logit_softcapping"),
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        **_GEMMA,
        head_norms=True,
        kinds=_kinds(lambda config, layer: bool((layer + 1) % getattr(config, "sliding_window_pattern", 6))),
        needs=_GEMMA_NEEDS,
    ),
    "Phi3ForCausalLM": Family("phi3", qkv=("qkv_proj",), gate_up=("gate_up_proj",)),
    "GraniteForCausalLM": Family(
        "granite",
        embedding_scale=lambda config: float(config.embedding_multiplier),
        residual=lambda config: float(config.residual_multiplier),
        logit_scale=lambda config: 1 / float(config.logits_scaling),
        score_scale=lambda config: float(config.attention_multiplier),
        biases=_asked,
        needs=_GRANITE,
    ),
    "Olmo2ForCausalLM": Family(
        "olmo2",
        before_attention=None,
        after_attention="post_attention_layernorm",
        before_mlp=None,
        after_mlp="post_feedforward_layernorm",
        head_norms=True,
        whole_norm=True,
        biases=_asked,
    ),
}
