"""GGUF architectures: a model that goes through the converter's layout and back computes the same logits."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bitfold.checkpoints.gguf.source import GgufSource
from bitfold.errors import CheckpointError
from gguf_families import MODELS, SIZES, logits, random_model, rebuilt, stored_state
from gguf_files import LLAMA, converted, llama_tensors, metadata_of, write_gguf

pytest.importorskip("gguf", reason="the gguf package (dev extra) writes the files")
transformers = pytest.importorskip("transformers")


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
