"""A small random model of every family that GGUF files are read and written of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bitfold.checkpoints.gguf.source import GgufSource

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# GGUF architecture: (model_type, config beyond SIZES, GGUF metadata beyond the common facts).
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", "llama", {"rope_theta": 5e4}, {"rope.freq_base": 5e4, "rope.dimension_count": 12}),
    "llama tied": ("llama", "llama", {"tie_word_embeddings": True}, {"rope.dimension_count": 12}),
    "llama biases": ("llama", "llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "llama linear rope": (
        "llama",
        "llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "mistral": ("llama", "mistral", {"sliding_window": 4}, {"attention.sliding_window": 4}),
    "qwen2": ("qwen2", "qwen2", {"rope_theta": 1e6}, {"rope.freq_base": 1e6}),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 16}, {"attention.key_length": 16, "attention.value_length": 16}),
    "gemma": ("gemma", "gemma", {"head_dim": 16}, {"attention.key_length": 16, "attention.value_length": 16}),
    "gemma2": (
        "gemma2",
        "gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4, "final_logit_softcapping": 3.0},
        {
            "attention.key_length": 16,
            "attention.value_length": 16,
            "attention.sliding_window": 4,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 4,
            "num_hidden_layers": 7,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {
            "attention.key_length": 16,
            "attention.value_length": 16,
            "attention.sliding_window": 4,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "phi3": (
        "phi3",
        "phi3",
        {"partial_rotary_factor": 0.5, "sliding_window": 5},
        {"rope.dimension_count": 6, "attention.sliding_window": 5},
    ),
}


# Mixtures of experts, by their names: (model_type, config beyond SIZES).
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3moe": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "head_dim": 16,
            "norm_topk_prob": True,
        },
    ),
}


def random_model(model_type: str, options: dict[str, Any]) -> Any:
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **options})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():  # large enough that positions and norms matter in the logits
            p.copy_(torch.randn_like(p) * 0.3)
    return model


def stored_state(model: Any) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    return state


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, SIZES["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids).logits


def rebuilt(source: GgufSource) -> Any:
    """A model out of nothing but what the source says."""
    config = transformers.AutoConfig.for_model(**source.config)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    result = model.load_state_dict({name: source.read(name).float() for name in source.names()}, strict=False)
    tied = ["lm_head.weight"] if source.config["tie_word_embeddings"] else []
    assert (result.missing_keys, result.unexpected_keys) == (tied, [])
    return model
