"""GGUF architectures as declarations: which Hugging Face names and config a GGUF file stands for.

To add a model family, add a row to ARCHITECTURES: the names of its layer tensors, what its config says beyond the
common facts, and whether llama.cpp's converter permuted its query/key rows (interleaved rotary embedding) or added an
offset to its norms. Everything a row does not account for is an error, never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bitfold.errors import CheckpointError

_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_LLAMA = {**_ATTENTION, **_MLP, "ffn_norm": "post_attention_layernorm"}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA2 = {
    **_ATTENTION,
    **_MLP,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3 = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
# Stacks of experts, as the checkpoint has them (one by one) and as the model class of transformers does.
_MIXTRAL = {
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
}
_QWEN_MOE = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_STACKS = {
    "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "mlp.experts.down_proj": ("ffn_down_exps",),
    "mlp.gate.weight": ("ffn_gate_inp",),
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# Tensors that restate facts of the config: read into it (rope_*) or recomputed by every model (attn_rot_embd).
CONFIG_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class Facts:
    """What a GGUF file says about its model.

    Args:
        metadata: all metadata.
        shapes: shape of each tensor, by GGUF name.
        values: values of the CONFIG_TENSORS that the file holds.
        where: the file, for error messages.
    """

    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    values: Mapping[str, list[float]]
    where: str

    @property
    def arch(self) -> str:
        """Value of general.architecture."""
        return str(self.metadata.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """Metadata below the architecture's prefix."""
        return self.metadata.get(f"{self.arch}.{key}", default)

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer, required if there is no default.

        Raises:
            CheckpointError: missing, not an integer, or a list with one number for each layer.
        """
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            hint = "models whose layers differ in size are not supported" if isinstance(value, list) else None
            raise CheckpointError(f"metadata {self.arch}.{key} is {value!r}, not a count", where=self.where, hint=hint)
        return value

    def real(self, key: str) -> float:
        """A required positive number."""
        value = self.get(key)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise CheckpointError(f"metadata {self.arch}.{key} is {value!r}, not a number > 0", where=self.where)
        return float(value)


Extra = Callable[[Facts, dict[str, Any]], None]


@dataclass(frozen=True)
class Place:
    """A tensor of a file, or the expert of that number in it."""

    name: str
    expert: int | None = None


@dataclass(frozen=True)
class Arch:
    """One model family.

    Args:
        model_type: Hugging Face model_type and class.
        layer: GGUF name of each layer tensor (without blk.N. and .weight) -> Hugging Face name.
        fixed: config entries that are the same for all models of the family.
        extra: adds the entries that need thought.
        interleaved: query and key rows were permuted for interleaved rotary embedding.
        norm_offset: what the converter added to every norm weight.
        experts: GGUF name of each stack of experts -> Hugging Face name of one of them, with {} for its number.
    """

    model_type: tuple[str, str]
    layer: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    extra: Extra | None = None
    interleaved: bool = False
    norm_offset: float = 0.0
    experts: Mapping[str, str] = field(default_factory=dict)

    def hf_name(self, name: str) -> str | None:
        """Hugging Face name of a GGUF tensor; None if the family has no such tensor."""
        parts = name.split(".")
        if len(parts) == 2 and parts[0] in _TOP:
            return f"{_TOP[parts[0]]}.{parts[1]}"
        if len(parts) == 4 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in self.layer:
            return f"model.layers.{int(parts[1])}.{self.layer[parts[2]]}.{parts[3]}"
        return None

    def expert_names(self, name: str, count: int) -> list[str] | None:
        """Hugging Face names of the experts in a GGUF tensor, by number; None if it is no stack of them."""
        parts = name.split(".")
        if len(parts) != 4 or parts[0] != "blk" or not parts[1].isdecimal() or parts[2] not in self.experts:
            return None
        return [f"model.layers.{int(parts[1])}.{self.experts[parts[2]].format(i)}.{parts[3]}" for i in range(count)]

    def places(self, name: str) -> list[Place]:
        """Where a Hugging Face tensor goes; nowhere if the family has no such tensor: the inverse of `hf_name` and
        `expert_names`, also of the names that the model class has for stacks."""
        module, _, kind = name.rpartition(".")
        if (top := next((g for g, hf in _TOP.items() if hf == module), None)) is not None:
            return [Place(f"{top}.{kind}")]
        parts = name.split(".", 3)
        if len(parts) != 4 or parts[:2] != ["model", "layers"] or not parts[2].isdecimal():
            return []
        prefix, rest = f"blk.{int(parts[2])}", parts[3]
        if self.experts and rest in _STACKS:
            return [Place(f"{prefix}.{part}.weight") for part in _STACKS[rest]]
        inner, _, kind = rest.rpartition(".")
        if (part := next((g for g, hf in self.layer.items() if hf == inner), None)) is not None:
            return [Place(f"{prefix}.{part}.{kind}")]
        number = next((n for n in inner.split(".") if n.isdecimal()), "")
        found = (g for g, hf in self.experts.items() if number and hf.format(number) == inner)
        return [Place(f"{prefix}.{part}.{kind}", int(number)) for part in found]


def _llama(facts: Facts, config: dict[str, Any]) -> None:
    config["attention_bias"] = "blk.0.attn_q.bias" in facts.shapes
    config["mlp_bias"] = "blk.0.ffn_up.bias" in facts.shapes
    if facts.get("attention.sliding_window"):  # Mistral's models are of ggml architecture "llama"
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        config["sliding_window"] = facts.count("attention.sliding_window")


def _qwen3(facts: Facts, config: dict[str, Any]) -> None:
    config["attention_bias"] = "blk.0.attn_q.bias" in facts.shapes


def _mixtral(facts: Facts, config: dict[str, Any]) -> None:
    config["num_local_experts"] = facts.count("expert_count")
    config["num_experts_per_tok"] = facts.count("expert_used_count")
    if facts.get("attention.sliding_window"):
        config["sliding_window"] = facts.count("attention.sliding_window")


def _qwen3_moe(facts: Facts, config: dict[str, Any]) -> None:
    _qwen3(facts, config)
    config["num_experts"] = facts.count("expert_count")
    config["num_experts_per_tok"] = facts.count("expert_used_count")
    config["moe_intermediate_size"] = facts.count("expert_feed_forward_length")


def _gemma_scalar(facts: Facts, config: dict[str, Any], largest: int) -> None:
    """GGUF does not store query_pre_attn_scalar: it is the head size, but hidden / heads in each largest model."""
    heads, size = config["num_attention_heads"], config["hidden_size"]
    config["query_pre_attn_scalar"] = size // heads if config["num_hidden_layers"] == largest else config["head_dim"]
    config["sliding_window"] = facts.count("attention.sliding_window")
    pattern = facts.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        config["layer_types"] = ["sliding_attention" if local else "full_attention" for local in pattern]


def _gemma2(facts: Facts, config: dict[str, Any]) -> None:
    _gemma_scalar(facts, config, largest=46)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        config[key] = facts.real(key)


def _gemma3(facts: Facts, config: dict[str, Any]) -> None:
    _gemma_scalar(facts, config, largest=62)
    config["rope_theta"] = facts.get("rope.freq_base", 1_000_000.0)
    config["rope_local_base_freq"] = facts.get("rope.freq_base_swa", 10_000.0)


def _phi3(facts: Facts, config: dict[str, Any]) -> None:
    if facts.get("attention.sliding_window"):
        config["sliding_window"] = facts.count("attention.sliding_window")
    config["partial_rotary_factor"] = facts.count("rope.dimension_count") / config["head_dim"]
    long, short = (facts.values.get(f"rope_factors_{which}.weight") for which in ("long", "short"))
    original = facts.get("rope.scaling.original_context_length", config["max_position_embeddings"])
    config["original_max_position_embeddings"] = original
    if long and short:
        config["rope_scaling"] = {"rope_type": "longrope", "long_factor": long, "short_factor": short}


_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}
ARCHITECTURES: dict[str, Arch] = {
    "llama": Arch(("llama", "LlamaForCausalLM"), _LLAMA, {"hidden_act": "silu"}, _llama, interleaved=True),
    "qwen2": Arch(("qwen2", "Qwen2ForCausalLM"), _LLAMA, {"hidden_act": "silu", "use_sliding_window": False}),
    "qwen3": Arch(("qwen3", "Qwen3ForCausalLM"), {**_LLAMA, **_QK_NORM}, {"hidden_act": "silu"}, _qwen3),
    "gemma": Arch(
        ("gemma", "GemmaForCausalLM"), _LLAMA, {**_GEMMA, "hidden_act": "gelu_pytorch_tanh"}, norm_offset=1.0
    ),
    "gemma2": Arch(("gemma2", "Gemma2ForCausalLM"), _GEMMA2, _GEMMA, _gemma2, norm_offset=1.0),
    "gemma3": Arch(("gemma3_text", "Gemma3ForCausalLM"), {**_GEMMA2, **_QK_NORM}, _GEMMA, _gemma3, norm_offset=1.0),
    "phi3": Arch(("phi3", "Phi3ForCausalLM"), _PHI3, {"hidden_act": "silu"}, _phi3),
}


# Where the file has experts.
MIXTURES: dict[str, Arch] = {
    "llama": Arch(
        ("mixtral", "MixtralForCausalLM"),
        {**_ATTENTION, "ffn_norm": "post_attention_layernorm", "ffn_gate_inp": "block_sparse_moe.gate"},
        {"hidden_act": "silu"},
        _mixtral,
        interleaved=True,
        experts=_MIXTRAL,
    ),
    "qwen3moe": Arch(
        ("qwen3_moe", "Qwen3MoeForCausalLM"),
        {**_ATTENTION, **_QK_NORM, "ffn_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.gate"},
        {"hidden_act": "silu", "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        _qwen3_moe,
        experts=_QWEN_MOE,
    ),
}


def find_arch(facts: Facts) -> Arch:
    """The row of the file's architecture.

    Raises:
        CheckpointError: an architecture without a row.
    """
    rows = MIXTURES if facts.get("expert_count") else ARCHITECTURES
    if facts.arch not in rows:
        mixtures = "mixtures of experts of " if rows is MIXTURES else ""
        hint = f"supported architectures: {', '.join(ARCHITECTURES)}; mixtures of experts: {', '.join(MIXTURES)}"
        raise CheckpointError(
            f"{mixtures}GGUF architecture {facts.arch!r} cannot be read", where=facts.where, hint=hint
        )
    return rows[facts.arch]


def hf_config(arch: Arch, facts: Facts) -> dict[str, Any]:
    """A complete Hugging Face config.json (without dtype).

    Raises:
        CheckpointError: metadata that is missing or contradicts the tensors.
    """
    embedding = facts.shapes.get("token_embd.weight")
    hidden, heads = facts.count("embedding_length"), facts.count("attention.head_count")
    if embedding is None or len(embedding) != 2 or embedding[1] != hidden:
        what = f"token_embd.weight is {embedding}, not (vocabulary, {hidden})"
        raise CheckpointError(what, where=facts.where, hint="the file is damaged")
    config: dict[str, Any] = {
        "architectures": [arch.model_type[1]],
        "model_type": arch.model_type[0],
        "vocab_size": embedding[0],
        "hidden_size": hidden,
        "intermediate_size": facts.count("feed_forward_length"),
        "num_hidden_layers": facts.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": facts.count("attention.head_count_kv", heads),
        "head_dim": _head_dim(arch, facts, hidden // heads),
        "max_position_embeddings": facts.count("context_length"),
        "rms_norm_eps": facts.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": facts.get("rope.freq_base", 10000.0),
        "rope_scaling": None,
        "tie_word_embeddings": "output.weight" not in facts.shapes,
        "attention_dropout": 0.0,
        "use_cache": True,
        **arch.fixed,
        **_token_ids(facts),
    }
    _rope_scaling(facts, config)
    if arch.extra is not None:
        arch.extra(facts, config)
    return config


def _head_dim(arch: Arch, facts: Facts, default: int) -> int:
    key = facts.get("attention.key_length")
    if key is None:
        # Phi rotates only a part of each head, so its rotary size is not the head's.
        return default if "attn_qkv" in arch.layer else int(facts.get("rope.dimension_count", default))
    if facts.get("attention.value_length", key) != key:
        raise CheckpointError("keys and values of different sizes are not supported", where=facts.where)
    return facts.count("attention.key_length")


def _token_ids(facts: Facts) -> dict[str, Any]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {hf: facts.metadata.get(f"tokenizer.ggml.{name}_token_id") for hf, name in names.items()}


def _rope_scaling(facts: Facts, config: dict[str, Any]) -> None:
    kind, factor = facts.get("rope.scaling.type", "none"), facts.get("rope.scaling.factor")
    original = facts.get("rope.scaling.original_context_length")
    if "rope_freqs.weight" in facts.values:
        config["rope_scaling"] = _llama3_scaling(facts, config)
    elif kind == "linear" and factor:
        config["rope_scaling"] = {"rope_type": "linear", "factor": float(factor)}
    elif kind == "yarn" and factor and original:
        scaling = {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": original}
        config["rope_scaling"] = scaling
    elif kind not in ("none", "longrope", "linear"):
        raise CheckpointError(f"rope scaling of type {kind!r} cannot be read", where=facts.where)


def _llama3_scaling(facts: Facts, config: dict[str, Any]) -> dict[str, Any]:
    """Llama 3.1's scaling, which GGUF stores as one divisor for each frequency: recover the factor and check the rest
    (wavelengths below 8192/4 are kept, above 8192/1 divided, interpolated between: arXiv 2407.21783 and its code)."""
    stored = facts.values["rope_freqs.weight"]
    factor, low, high, original = max(stored), 1.0, 4.0, 8192
    for i, divisor in enumerate(stored):
        wavelength = 2 * math.pi * config["rope_theta"] ** (2 * i / config["head_dim"])
        blend = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        if abs(1 / ((1 - blend) / factor + blend) - divisor) > 1e-3 * divisor:
            what = "rope_freqs.weight holds frequencies that are not Llama 3's scaling"
            raise CheckpointError(what, where=facts.where, hint="use the original checkpoint of this model")
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    return {**scaling, "original_max_position_embeddings": original}
