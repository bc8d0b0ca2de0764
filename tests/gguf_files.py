"""Small GGUF files for tests, written by the `gguf` package the way llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

# The converter's names, stated here on their own: tests must not read them from the code under test.
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_NAMES = {
    **LAYER_NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def interleave(w: torch.Tensor, heads: int) -> torch.Tensor:
    """Hugging Face's query/key rows (halves apart) -> the order of llama.cpp (pairs side by side)."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def gguf_name(name: str, arch: str) -> str:
    """GGUF name of a Hugging Face tensor."""
    module, kind = name.rsplit(".", 1)
    if module in TOP_NAMES:
        return f"{TOP_NAMES[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{(GEMMA_NAMES if arch in ('gemma2', 'gemma3') else LAYER_NAMES)[rest]}.{kind}"


def converted(state: dict[str, torch.Tensor], arch: str, heads: int, kv_heads: int) -> dict[str, np.ndarray]:
    """A state dict as the converter stores it."""
    out = {}
    for name, w in state.items():
        if arch == "llama" and ".q_proj." in name:
            w = interleave(w, heads)
        elif arch == "llama" and ".k_proj." in name:
            w = interleave(w, kv_heads)
        elif arch.startswith("gemma") and name.endswith("norm.weight"):
            w = w + 1
        out[gguf_name(name, arch)] = w.detach().float().numpy()
    return out


def metadata_of(config: Any, arch: str, **extra: Any) -> dict[str, Any]:
    """The model metadata that the converter derives from a Hugging Face config."""
    facts = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        **extra,
    }
    return {f"{arch}.{key}": value for key, value in facts.items()}


def write_gguf(
    path: Path,
    arch: str,
    tensors: dict[str, np.ndarray],
    metadata: dict[str, Any] | None = None,
    types: dict[str, str] | None = None,
    alignment: int | None = None,
) -> Path:
    """Write a file; `types` gives tensors a ggml type other than F32."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, value in (metadata or {}).items():
        _add(writer, key, value)
    for name, w in tensors.items():
        kind = gguf.GGMLQuantizationType[(types or {}).get(name, "f32").upper()]
        plain = kind.name in ("F32", "F16")
        data = w.astype(np.float16 if kind.name == "F16" else np.float32) if plain else gguf.quantize(w, kind)
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=None if plain else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


LLAMA = {
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": 16,
}


def llama_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors of a one-layer Llama that LLAMA describes, in GGUF's names and order."""
    shapes = {
        "token_embd.weight": (48, 32),
        "blk.0.attn_norm.weight": (32,),
        "blk.0.ffn_norm.weight": (32,),
        "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (16, 32),
        "blk.0.attn_v.weight": (16, 32),
        "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_gate.weight": (64, 32),
        "blk.0.ffn_up.weight": (64, 32),
        "blk.0.ffn_down.weight": (32, 64),
        "output_norm.weight": (32,),
    }
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
