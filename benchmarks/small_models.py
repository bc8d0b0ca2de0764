"""A small random model of any family of transformers: its default config with every size shrunk, weights from a seed.

Sizes are told by the names of attributes, which transformers shares between families; what a name does not tell stands
in OVERRIDES. Per-layer lists keep one layer of each kind that occurs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

VOCABULARY = 288  # 256 bytes, an end token, and room for image tokens and the like
END = 256
_LAYER_COUNT = re.compile(r"num_hidden_layers|num_layers|n_layers?|depth|layers")

# First match wins. Every width is the same, so that widths that must agree do.
_SIZES = [(re.compile(pattern), value) for pattern, value in [
    (r"(\w+_)?vocab_size|vocab_size_per_layer_input|encoder_hash_byte_group_vocab", VOCABULARY),
    (r"codebook_size", 256),
    (r"type_vocab_size|task_type_vocab_size", 2),
    (r"\w*moe_intermediate_size|shared_experts?_intermediate_size|share_expert_dim|expert_ffn_hidden_size", 32),
    (r"qk_head_dim", 32),
    (r"rotary_dim", 8),
    (r"(\w*_)?(head_dim|headdim|d_kv|dim_head|d_head|kv_channels|attention_head_size)", 16),
    (r"(\w*_)?(num_heads|n_heads?|attention_heads|num_attention_heads|key_heads|value_heads|resampler_heads)", 4),
    (r"(\w*_)?(intermediate_size(_mlp)?|ffn_dim|d_ff|ffn_hidden_size|n_inner|d_inner|mlp_dim)", 96),
    (r"dff|dim_ff|feed_forward_size", 96),
    (r"(\w*_)?(lora_rank|lowrank|gate_rank|adapter_rank|laurel_rank|norm_rank|time_step_rank|dt_rank)", 16),
    (r"(\w*_)?(hidden_size(_global)?|d_model|n_embd|embed_dim|embedding_size|emb_dim|embedding_dim)", 64),
    (r"(\w*_)?(hidden_dim|output_dim|output_channels|projection_dim|embed_proj_dim|lru_width|output_size)", 64),
    (r"(projector|adapter)_(input|output|in|out)_(dim|size)|proj_size|text_dim|moe_latent_size|codebook_dim", 64),
    (r"hidden_size_per_layer_input|base_channels|latent_channels|num_filters", 32),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"(\w*_)?(num_experts|num_local_experts|n_routed_experts|zero_expert_num)", 4),
    (r"(\w*_)?(experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts)", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"n_groups|mamba_n_?groups", 2),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_mtp_layers", 0),
    (r"(\w*_)?(num_layers(_per_stack)?|n_layers?|layers|depth|num_blocks)", 2),
    (r"(\w*_)?(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target)_positions)", 128),
    (r"context_length", 128),
    (r"(\w*_)?(state_size|d_state)", 16),
    (r"chunk_size|mamba_chunk_size|attention_chunk_size|(\w*_)?block_size", 16),
    (r"sliding_window(_size)?|attention_window(_size)?|local_attention|window_size", 16),
    (r"image_size|crop_size|max_image_size", 32),
    (r"index_n_heads", 4),
        (r"index_topk", 32),
    (r"num_query_tokens|mm_tokens_per_image|image_seq_length|num_image_tokens", 4),
    (r"num_mel_bins", 16),
]]  # fmt: skip
_KV_HEADS = re.compile(r"(\w*_)?(num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups)")
_TOKEN = re.compile(r"(\w*_)?(token_id|token_index|_id|_index)s?")
_TEXT_TOKENS = {"eos_token_id": END, "pad_token_id": END, "bos_token_id": 0, "decoder_start_token_id": 0}
_MAMBA = {"mamba_d_head": 32}
_IMAGE = {"vocabulary_map": {"<image>": 280, "<|extra_200|>": 281}}
_MROPE = {"text_config.rope_parameters.mrope_section": [4, 2, 2]}
_ZAMBA = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "attention_hidden_size": 128}
_INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}  # fmt: skip
_ROPE = {"full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}

# What names do not tell. Keys are paths into the config; "" holds what its class must be made with.
OVERRIDES: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "audio_config.hidden_size": 64, "audio_config.codebook_dim": 64, "image_token_offset": 16,
        "audio_token_offset": 272, "text_config.vocab_size": 544,
    },
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "chameleon": _IMAGE,
    "cohere_compass": {"text_config.rope_parameters": _ROPE},
    "cohere_compass_text": {"rope_parameters": _ROPE},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": {
        "text_config.num_experts": 4, "text_config.top_k_experts": 2, "text_config.moe_intermediate_size": 32
    },
    "dory": {
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp"] * 2, "num_hidden_layers": 8,
        "n_input_layers": 2, "n_recurrent_layers": 4, "n_output_layers": 2,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_experts_per_tok": 2},
    "dots3_note": {"text_config.head_dim": 32},
    "dots3_note_text": {"head_dim": 32},
    "emu3": {"text_config.pad_token_id": 0, **_IMAGE},
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [3, 3, 2]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "florence2": {
        "vision_config.embed_dim": [16, 16, 32, 64], "vision_config.num_heads": [2, 2, 2, 4],
        "vision_config.num_groups": [2, 2, 2, 4], "vision_config.depths": [1, 1, 1, 1],
    },
    "gemma4_assistant": {
        "": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}
    },
    "glm46v": _MROPE,
    "glm4v": _MROPE,
    "glm4v_moe": {"text_config.rope_parameters.mrope_section": [2, 1, 1]},
    "glm5_next": {"text_config.index_topk": 16, "text_config.index_kpool": 4},
    "glm_ocr": _MROPE,
    "glmga": _MROPE,
    "granite4_vision": {
        "downsample_rate": "4/8", "deepstack_layer_map": [[0, 0], [1, 1]], "spatial_target_layers": [0, 1]
    },
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "hunyuan_vl": {"text_config.rope_parameters.mrope_section": [4, 2, 2]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 32},
    "mistral4": {"head_dim": 32},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "paddleocr_vl": _MROPE,
    "qwen2_5_vl": _MROPE,
    "qwen2_vl": _MROPE,
    "qwen4_exp": {f"text_config.{key}": value for key, value in _INDEXER.items()},
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 16]},
    "step3p7": {"text_config.sliding_window": 16},
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config.num_filters": 4, "semantic_tokenizer_encoder_config.num_filters": 4
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_ZAMBA, "attention_head_dim": 32},
    "zamba2": {**_ZAMBA, "attention_head_dim": 32, "hybrid_layer_ids": [1, 3]},
}  # fmt: skip


def small_config(kind: str) -> Any:
    """The config of a model type (a key of transformers' CONFIG_MAPPING) with small sizes."""
    cls = hf.CONFIG_MAPPING[kind]
    changes = OVERRIDES.get(kind, {})
    data = _shrunk(cls(**changes.get("", {})).to_dict(), [0])
    for path, value in changes.items():
        *outer, last = path.split(".")
        where = data
        for key in outer:
            where = where.setdefault(key, {})
        if path:
            where[last] = value
    return cls.from_dict(data)


def _shrunk(data: Mapping[str, Any], special: list[int]) -> dict[str, Any]:
    """The same keys with small values; `special` counts the token ids given out."""
    found: dict[str, Any] = {}
    layers = _layers_to_keep(data)
    for key, value in data.items():
        if key in ("id2label", "label2id"):  # from_dict makes them
            continue
        if key == "per_layer_config" and isinstance(value, Mapping):
            found[key] = {layers.index(int(i)): _shrunk(v, special) for i, v in value.items() if int(i) in layers}
        elif isinstance(value, Mapping):
            found[key] = _shrunk(value, special)
        elif isinstance(value, list) and layers and len(value) == _layer_count(data):
            found[key] = [_small(key, value[i], data, [], special) for i in layers]
        elif key == "mrope_section" and isinstance(value, list):
            found[key] = _sections(int(8 * data.get("partial_rotary_factor", 1)))
        else:
            found[key] = _small(str(key), value, data, layers, special)
    return found


def _sections(total: int) -> list[int]:
    return [total - 2 * (total // 4), total // 4, total // 4]


def _small(key: str, value: Any, data: Mapping[str, Any], layers: list[int], special: list[int]) -> Any:
    heads = data.get("num_attention_heads", data.get("n_heads"))
    if _KV_HEADS.fullmatch(key) and value in (None, heads):
        return 4
    if key == "head_dim" and value is None:
        return 16
    if key in ("initializer_range", "init_std"):
        return 0.1  # outputs that depend on every layer, not on embeddings alone
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if _KV_HEADS.fullmatch(key):
        return min(value, 2)
    if layers and _LAYER_COUNT.fullmatch(key):
        return len(layers)
    if key in _TEXT_TOKENS:
        return value if value < VOCABULARY - 32 and key != "eos_token_id" else _TEXT_TOKENS[key]
    if _TOKEN.fullmatch(key) and value >= 0:
        special[0] += 1
        return END + special[0]
    return next((min(value, small) for pattern, small in _SIZES if pattern.fullmatch(key)), value)


def _layer_count(data: Mapping[str, Any]) -> int:
    return next((v for k, v in data.items() if isinstance(v, int) and _LAYER_COUNT.fullmatch(str(k))), 0)


def _layers_to_keep(data: Mapping[str, Any]) -> list[int]:
    """Layers so that every combination of kinds in the per-layer lists occurs, at least two; [] without lists."""
    count = _layer_count(data)
    lists = [value for value in data.values() if isinstance(value, list) and len(value) == count > 2]
    special = {int(i) for i in data.get("per_layer_config") or {}}
    if not lists:
        return []
    kinds: dict[str, int] = {}
    for i in range(count):
        kind = [values[i] for values in lists if isinstance(values[i], (str, bool))]
        kinds.setdefault(repr([kind, i in special]), i)
    keep = sorted(kinds.values())
    return keep if len(keep) > 1 else [0, 1]


def small_model(config: Any, name: str, seed: int = 0) -> nn.Module:
    """A transformers class with random weights; norms and biases, born as ones and zeros, get values of their own."""
    cls: Any = getattr(hf, name)
    parts = [config, *(getattr(config, part) for part in config.sub_configs)]
    config = next((part for part in parts if isinstance(part, cls.config_class)), config)  # a part of a larger model
    torch.manual_seed(seed)
    model: Any = cls(config)
    if getattr(config, "is_encoder_decoder", False):
        model.generation_config.decoder_start_token_id = 0
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or float(parameter.std()) == 0:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    made: nn.Module = model.eval()
    return made


def byte_tokenizer() -> hf.PreTrainedTokenizerFast:
    """256 bytes and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate([*alphabet, "<end>"])}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>")
