"""A model's config as GGUF says it: metadata, and the tensors that restate facts of it. The inverse of `arch`.

Keys are those of llama.cpp's converter and loader. What a config says and GGUF has no word for is an error, never left
out: the file would be another model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bitfold.checkpoints.gguf.arch import ARCHITECTURES, MIXTURES, Arch
from bitfold.errors import CheckpointError

# Hugging Face model_type -> general.architecture, and its row. Mistral's models are of architecture "llama".
_NAMED = {row.model_type[0]: (name, row) for rows in (ARCHITECTURES, MIXTURES) for name, row in rows.items()}
_NAMED["mistral"] = _NAMED["llama"]
# What llama.cpp takes for granted of mixtures.
_AS_USUAL = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
_ACTIVATIONS = {"gemma": "gelu_pytorch_tanh", "gemma2": "gelu_pytorch_tanh", "gemma3": "gelu_pytorch_tanh"}
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}  # layers of the models whose attention is scaled by hidden / heads


@dataclass
class Described:
    """A model as GGUF has it.

    Args:
        arch: its row of ARCHITECTURES.
        name: general.architecture.
        metadata: all but general.file_type and the tokenizer.
        tensors: factors of the rotary embedding, float32, by GGUF name.
        heads: of queries and of keys.
    """

    arch: Arch
    name: str
    metadata: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    heads: tuple[int, int] = (1, 1)

    def put(self, key: str, value: Any) -> None:
        """Metadata below the architecture's prefix."""
        self.metadata[f"{self.name}.{key}"] = value

    def gguf_name(self, name: str) -> str | None:
        """GGUF name of a tensor of the model, of the first where it becomes several; None where there is no place."""
        return next((place.name for place in self.arch.places(name)), None)


def describe_model(config: Mapping[str, Any], title: str, where: str) -> Described:
    """The metadata of a model.

    Args:
        config: contents of its config.json.
        title: general.name.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: an architecture that GGUF, or this program, does not know, or a config that it cannot say.
    """
    name, arch = _NAMED.get(str(config.get("model_type")), (None, None))
    if name is None or arch is None:
        what = f"models of type {config.get('model_type')!r} cannot be written as GGUF"
        raise CheckpointError(what, where=where, hint=f"written are {', '.join(sorted(_NAMED))}")
    full, said = _with_defaults(config), _Said(config, where)
    head = {"general.architecture": name, "general.type": "model", "general.name": title}
    found = Described(arch, name, {**head, "general.quantization_version": 2})
    heads = int(full["num_attention_heads"])
    found.heads = (heads, int(full.get("num_key_value_heads") or heads))
    _common(full, found)
    _require(full, name, said)
    rope = _rope(full)
    _positions(rope, full, found, said)
    _family(full, rope, found, said)
    return found


@dataclass(frozen=True)
class _Said:
    """What an error about a config says."""

    config: Mapping[str, Any]
    where: str

    def refuse(self, key: str, value: Any) -> None:
        what = f"GGUF has no word for {key} = {value!r} of {self.config.get('model_type')} models"
        raise CheckpointError(what, where=self.where, hint="use another output, such as a bitfold folder")


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with what its class fills in: files leave out what is as usual."""
    from transformers import AutoConfig

    given = {key: value for key, value in config.items() if key != "quantization_config"}
    full: dict[str, Any] = AutoConfig.for_model(**given).to_dict()
    return {**given, **full}


def _common(config: Mapping[str, Any], found: Described) -> None:
    heads, kv_heads = found.heads
    found.put("block_count", int(config["num_hidden_layers"]))
    found.put("context_length", int(config["max_position_embeddings"]))
    found.put("embedding_length", int(config["hidden_size"]))
    found.put("feed_forward_length", int(config["intermediate_size"]))
    found.put("attention.head_count", heads)
    found.put("attention.head_count_kv", kv_heads)
    found.put("attention.layer_norm_rms_epsilon", float(config["rms_norm_eps"]))
    found.put("vocab_size", int(config["vocab_size"]))
    if config.get("head_dim"):
        found.put("attention.key_length", int(config["head_dim"]))
        found.put("attention.value_length", int(config["head_dim"]))


def _require(config: Mapping[str, Any], name: str, said: _Said) -> None:
    """What llama.cpp takes for granted of each family."""
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation != _ACTIVATIONS.get(name, "silu"):
        said.refuse("hidden_act", activation)
    if config.get("use_sliding_window"):
        said.refuse("use_sliding_window", True)
    if config.get("use_bidirectional_attention"):
        said.refuse("use_bidirectional_attention", True)


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the rotary embedding of full attention, as transformers 5 keeps them; of 4 as well."""
    found = config.get("rope_parameters")
    if found is None:
        found = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}
    if "full_attention" in found:
        local = found.get("sliding_attention", {}).get("rope_theta")
        found = {**found["full_attention"], "local": local}
    elif "rope_local_base_freq" in config:
        found = {**found, "local": config["rope_local_base_freq"]}
    kind = found.get("rope_type") or found.get("type") or "default"
    return {"rope_theta": config.get("rope_theta", 10000.0), **found, "rope_type": kind}


def _positions(rope: Mapping[str, Any], config: Mapping[str, Any], found: Described, said: _Said) -> None:
    part = float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    if part != 1.0 and found.name != "phi3":
        said.refuse("partial_rotary_factor", part)
    found.put("rope.freq_base", float(rope["rope_theta"]))
    found.put("rope.dimension_count", int(_head_dim(config) * part))
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        found.put("rope.scaling.type", kind)
        found.put("rope.scaling.factor", float(rope["factor"]))
    if kind == "yarn":
        for key in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            if rope.get(key) not in (None, {"beta_fast": 32.0, "beta_slow": 1.0}.get(key)):
                said.refuse(f"rope_scaling.{key}", rope[key])
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        found.put("rope.scaling.original_context_length", int(original))
    elif kind == "llama3":
        found.tensors["rope_freqs.weight"] = _llama3_divisors(rope, _head_dim(config))
    elif kind == "longrope" and found.name == "phi3":
        _longrope(rope, config, found)
    elif kind not in ("default", "linear"):
        said.refuse("rope_scaling", kind)


def _llama3_divisors(rope: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """float32 (head_dim / 2): by what each frequency is divided, see `arch`."""
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original, divisors = float(rope["original_max_position_embeddings"]), []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * float(rope["rope_theta"]) ** (2 * i / head_dim)
        blend = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        divisors.append(1 / ((1 - blend) / factor + blend))
    return torch.tensor(divisors, dtype=torch.float32)


def _longrope(rope: Mapping[str, Any], config: Mapping[str, Any], found: Described) -> None:
    """Two lists of divisors, and the factor on attention that goes with how far the context was stretched."""
    largest = int(config["max_position_embeddings"])
    original = int(
        rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or largest
    )
    stretched = largest / original
    attention = rope.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(stretched) / math.log(original)) if stretched > 1 else 1.0
    found.put("rope.scaling.attn_factor", float(attention))
    for which in ("long", "short"):
        found.tensors[f"rope_factors_{which}.weight"] = torch.tensor(rope[f"{which}_factor"], dtype=torch.float32)


def _experts(config: Mapping[str, Any], found: Described, said: _Said) -> None:
    """Mixtures of experts."""
    found.put("expert_count", int(config.get("num_local_experts") or config["num_experts"]))
    found.put("expert_used_count", int(config["num_experts_per_tok"]))
    if "moe_intermediate_size" in config:
        found.put("expert_feed_forward_length", int(config["moe_intermediate_size"]))
    for key, usual in _AS_USUAL.items():
        if config.get(key) not in (None, usual):
            said.refuse(key, config[key])


def _family(config: Mapping[str, Any], rope: Mapping[str, Any], found: Described, said: _Said) -> None:
    """What only some families have."""
    if found.arch.experts:
        _experts(config, found, said)
    window = config.get("sliding_window")
    if window and found.name in ("llama", "phi3", *_LARGEST_GEMMA):
        found.put("attention.sliding_window", int(window))
    if found.name == "phi3":
        original = config.get("original_max_position_embeddings") or config["max_position_embeddings"]
        found.put("rope.scaling.original_context_length", int(original))
    if found.name not in _LARGEST_GEMMA:
        return
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key):
            found.put(key, float(config[key]))
    if found.name == "gemma3":
        found.put("rope.freq_base_swa", float(rope.get("local") or 10000.0))
    if (types := config.get("layer_types")) is not None:
        _window_pattern([kind == "sliding_attention" for kind in types], found)
    heads, size = int(config["num_attention_heads"]), int(config["hidden_size"])
    largest = config["num_hidden_layers"] == _LARGEST_GEMMA[found.name]
    scalar = config.get("query_pre_attn_scalar")
    if scalar is not None and scalar != (size // heads if largest else _head_dim(config)):
        said.refuse("query_pre_attn_scalar", scalar)


def _window_pattern(local: list[bool], found: Described) -> None:
    """Which layers look through a window, where it is not as usual: the last of every two (Gemma 2) or six do not."""
    period = 2 if found.name == "gemma2" else 6
    if local != [(i + 1) % period != 0 for i in range(len(local))]:
        found.put("attention.sliding_window_pattern", local)
