"""Small random models of every family that the engine has code for."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

TOKENS = 150
SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WIDE = {**SMALL, "head_dim": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
CONFIGS: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**WIDE, attention_bias=True, mlp_bias=True),
    "llama-scaled": lambda: hf.LlamaConfig(**SMALL, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "mistral": lambda: hf.MistralConfig(**SMALL, sliding_window=40),
    "ministral": lambda: hf.MinistralConfig(**WIDE, sliding_window=40),
    "qwen2": lambda: hf.Qwen2Config(**SMALL),
    "qwen3": lambda: hf.Qwen3Config(**WIDE),
    "gemma2": lambda: hf.Gemma2Config(**WIDE, sliding_window=32, query_pre_attn_scalar=32),
    "gemma3": lambda: hf.Gemma3TextConfig(**WIDE, sliding_window=32, sliding_window_pattern=2),
    "phi3": lambda: hf.Phi3Config(**SMALL, sliding_window=50),
    "phi4": lambda: hf.Phi3Config(**{**WIDE, "num_attention_heads": 2}, partial_rotary_factor=0.75),
    "mixtral": lambda: hf.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "qwen2-moe": lambda: hf.Qwen2MoeConfig(**SMALL, **EXPERTS, shared_expert_intermediate_size=64),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(**WIDE, **EXPERTS, norm_topk_prob=True, mlp_only_layers=[1]),
    "granite": lambda: hf.GraniteConfig(**SMALL, **GRANITE),
    "olmo2": lambda: hf.Olmo2Config(**SMALL),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    for p in model.parameters():
        if p.dim() == 1:  # norms and biases that tell whether they are used
            nn.init.normal_(p, 0.0 if "gemma" in name else 1.0, 0.2)
    return model


def ids_of(count: int = TOKENS, seed: int = 1) -> list[int]:
    return torch.randint(3, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
