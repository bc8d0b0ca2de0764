"""GGUF architectures: a model that goes through the converter's layout and back computes the same logits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitfold.checkpoints.gguf.source import GgufSource
from bitfold.errors import CheckpointError
from gguf_files import LLAMA, converted, llama_tensors, metadata_of, write_gguf

pytest.importorskip("gguf", reason="the gguf package (dev extra) writes the files")
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


@pytest.mark.parametrize("case", MODELS)
def test_same_logits_after_the_round_trip(case: str, tmp_path: Path):
    arch, model_type, options, extra = MODELS[case]
    model = random_model(model_type, options)
    heads, kv_heads = SIZES["num_attention_heads"], SIZES["num_key_value_heads"]
    tensors = converted(stored_state(model), arch, heads, kv_heads)
    path = write_gguf(tmp_path / "model.gguf", arch, tensors, metadata_of(model.config, arch, **extra))
    source = GgufSource(path)
    expected, found = logits(model), logits(rebuilt(source))
    # Gemma's norms lose an ulp by + 1 - 1; the others are the same numbers in the same places.
    bound = 1e-3 if arch.startswith("gemma") else 1e-5
    assert (found - expected).abs().max() <= bound * expected.abs().max()
    source.close()


@pytest.mark.parametrize("case", ["llama", "gemma", "mistral", "phi3"])
def test_the_comparison_would_notice(case: str, tmp_path: Path):
    """The converter's transformations matter: without them, or with other facts, the logits differ."""
    arch, model_type, options, extra = MODELS[case]
    model = random_model(model_type, options)
    wrong = {"attention.sliding_window": 200, "rope.dimension_count": 12} if arch == "phi3" else {}
    if case == "mistral":
        wrong = {"attention.sliding_window": 9}
    plain = "qwen2" if arch in ("llama", "gemma") and case != "mistral" else arch  # qwen2: neither permuted nor offset
    tensors = converted(stored_state(model), plain, 4, 2)
    facts = metadata_of(model.config, arch, **{**extra, **wrong})
    found = logits(rebuilt(GgufSource(write_gguf(tmp_path / "m.gguf", arch, tensors, facts))))
    assert (found - logits(model)).abs().max() > 0.01 * logits(model).abs().max()


def llama3_divisors(theta: float, head_dim: int, factor: float, original: int = 8192) -> np.ndarray:
    """transformers' llama3 rope, asked for its frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    options = {"rope_theta": theta, "rope_scaling": {**scaling, "original_max_position_embeddings": original}}
    config = transformers.LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, **options)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = theta ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    return (plain / scaled).float().numpy()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_is_recovered_from_its_divisors(factor: float, tmp_path: Path):
    facts = {**LLAMA, "llama.rope.freq_base": 5e5}
    tensors = {**llama_tensors(), "rope_freqs.weight": llama3_divisors(5e5, 16, factor)}
    source = GgufSource(write_gguf(tmp_path / "a.gguf", "llama", tensors, facts))
    scaling = source.config["rope_scaling"]
    assert scaling["rope_type"] == "llama3"
    assert math.isclose(scaling["factor"], factor, rel_tol=1e-5)
    assert "rope_freqs.weight" not in source.names()
    tensors["rope_freqs.weight"] = llama3_divisors(5e5, 16, factor, original=4096)
    with pytest.raises(CheckpointError, match="Llama 3"):
        GgufSource(write_gguf(tmp_path / "b.gguf", "llama", tensors, facts))


def test_phi3_long_rope_comes_from_its_tensors(tmp_path: Path):
    factors = {"long_factor": [1.5] * 6, "short_factor": [1.25] * 6}
    options = {"rope_scaling": {"type": "longrope", **factors}, "original_max_position_embeddings": 64}
    model = random_model("phi3", options)
    tensors = converted(stored_state(model), "phi3", 4, 2)
    tensors |= {f"rope_factors_{k.split('_')[0]}.weight": np.array(v, np.float32) for k, v in factors.items()}
    extra = {"rope.dimension_count": 12, "rope.scaling.original_context_length": 64}
    path = write_gguf(tmp_path / "m.gguf", "phi3", tensors, metadata_of(model.config, "phi3", **extra))
    source = GgufSource(path)
    assert source.config["rope_scaling"]["long_factor"] == factors["long_factor"]
    assert torch.allclose(logits(rebuilt(source)), logits(model), atol=1e-4)


def test_head_sizes_and_window_patterns(tmp_path: Path):
    facts = {**LLAMA, "llama.attention.key_length": 16, "llama.attention.value_length": 8}
    with pytest.raises(CheckpointError, match="different sizes"):
        GgufSource(write_gguf(tmp_path / "a.gguf", "llama", llama_tensors(), facts))
    uneven = {**LLAMA, "llama.feed_forward_length": [64, 32]}
    with pytest.raises(CheckpointError, match=r"feed_forward_length.*layers differ"):
        GgufSource(write_gguf(tmp_path / "b.gguf", "llama", llama_tensors(), uneven))
    wrong_heads = {**LLAMA, "llama.attention.head_count": 3}
    source = GgufSource(write_gguf(tmp_path / "c.gguf", "llama", llama_tensors(), wrong_heads))
    with pytest.raises(CheckpointError, match=r"attn_q.*3 heads"):
        source.read("model.layers.0.self_attn.q_proj.weight")
