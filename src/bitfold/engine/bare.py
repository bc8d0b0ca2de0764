"""A model as the engine needs it: the tensors of a checkpoint under their names, and the numbers of its config.

transformers' classes and what they import take longer to come up than a small model to answer, and a plan needs of a
model its weights, its shapes and its angles. So where a config says all of it in words that are known here, a tree of
plain modules with transformers' names is filled, and `make_plan` takes it as it takes transformers' model. Whatever
else a config says is transformers' to read: `build` gives None then, and nothing is guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bitfold.engine.families import FAMILIES, Family
from bitfold.errors import CheckpointError
from bitfold.models import skeleton

NEEDED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
)
_MOST_LAYERS = 10_000
_FULL, _LOCAL = "full_attention", "sliding_attention"
_COMPUTED = "rotary_emb.inv_freq"  # old checkpoints store what every model computes
_PLAIN = (  # what a generation config may say for this room to read it without transformers
    *("_from_model_config", "transformers_version", "do_sample", "max_length", "max_new_tokens", "use_cache"),
    *("output_attentions", "output_hidden_states", "output_scores", "return_dict_in_generate"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty"),
)


class Settings(SimpleNamespace):
    """A generation config; what it does not say is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def update(self, **settings: Any) -> None:
        """As transformers' method."""
        vars(self).update(settings)


class Numbers(SimpleNamespace):
    """The config of a model."""

    def to_dict(self) -> dict[str, Any]:
        """What config.json says, and what follows from it."""
        return {key: value for key, value in vars(self).items() if key != "ropes"}


class Norm(nn.Module):
    """The weight of an RMS norm."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))
        self.variance_epsilon = eps


class Rotary(nn.Module):
    """Angles of positions, as transformers' rotary modules give them.

    Args:
        ropes: of each kind of layer (None: all alike) its type, base and factors.
        dim: channels of a head that turn.
        longest: positions that the model was made for.
    """

    def __init__(self, ropes: Mapping[str | None, Mapping[str, Any]], dim: int, longest: int) -> None:
        super().__init__()
        types = {kind: rope["rope_type"] for kind, rope in ropes.items()}
        self.rope_type: Any = types.get(None, types)
        self.original_max_seq_len = longest
        self._frequencies = {kind: _frequencies(rope, dim) for kind, rope in ropes.items()}

    def forward(self, x: Tensor, where: Tensor, kind: str | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines (..., dim) of positions (...), in the dtype of `x`."""
        angles = where[..., None].float() * self._frequencies[kind]
        both = torch.cat((angles, angles), dim=-1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)


def _frequencies(rope: Mapping[str, Any], dim: int) -> Tensor:
    """Radians for a position, float32 (dim / 2).

    Llama 3's: wavelengths above `original / low` are stretched, those below `original / high` are not, and there is a
    ramp between (arXiv 2407.21783 and its code).
    """
    plain: Tensor = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
    if rope["rope_type"] == "default":
        return plain
    factor = rope["factor"]
    if rope["rope_type"] == "linear":
        plain /= factor
        return plain
    low, high, original = (rope[k] for k in ("low_freq_factor", "high_freq_factor", _ORIGINAL))
    length = 2 * math.pi / plain
    share = (original / length - low) / (high - low)
    ramp = (1 - share) * plain / factor + share * plain
    return torch.where(length > original / low, plain / factor, torch.where(length < original / high, plain, ramp))


_ORIGINAL = "original_max_position_embeddings"
_ROPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
}


def build(config: Mapping[str, Any], dtype: torch.dtype | None) -> nn.Module | None:
    """The empty model of a config.json, on the meta device; None where transformers must read it.

    Args:
        config: its contents.
        dtype: of its parameters; None: what the config says, else float32.
    """
    names = skeleton.architectures(config)
    family = FAMILIES.get(names[0]) if len(names) == 1 else None
    read = None if family is None else read_config(family, config)
    if family is None or read is None:
        return None
    with skeleton.parameters_on_meta():
        # The class has the name of transformers' own: it is what errors say and where its family is looked up.
        model: nn.Module = type(names[0], (Bare,), {})(family, read, dtype or skeleton.config_dtype(read))
    skeleton.retie(model)
    return model.eval()


def matches(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether tensors of these names are those of the model, each once."""
    found = {name for name in names if not name.endswith(_COMPUTED)}
    aliases = skeleton.tied_names(model).keys()
    return found == {name for name, _ in model.named_parameters(remove_duplicate=False)} - aliases


def read_config(family: Family, config: Mapping[str, Any]) -> Numbers | None:
    """The numbers of a config under transformers' names; None where anything is missing, or said in other words."""
    if config.get("model_type") != family.model_type or family.mixture is not None:
        return None
    if any(config.get(key) is None for key in NEEDED) or any(key not in config for key in family.needs):
        return None
    if not all(_is_number(config[key]) for key in NEEDED) or config["num_hidden_layers"] > _MOST_LAYERS:
        return None
    if config.get("use_bidirectional_attention"):
        return None
    read = Numbers(**{key: value for key, value in config.items() if key != "quantization_config"})
    read.head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    tied = config.get("tie_word_embeddings")
    read.tie_word_embeddings = family.tied if tied is None else bool(tied)
    kinds = config.get("layer_types")
    if family.kinds is None and kinds is not None:
        return None
    if family.kinds is not None:
        if getattr(read, "use_sliding_window", False) and "max_window_layers" not in config:
            return None
        read.layer_types = kinds or family.kinds(read)
        if len(read.layer_types) != read.num_hidden_layers or not {*read.layer_types} <= {_FULL, _LOCAL}:
            return None
    read.ropes = _ropes(family, config, read)
    return None if read.ropes is None else read


def _ropes(family: Family, config: Mapping[str, Any], read: Numbers) -> dict[str | None, dict[str, Any]] | None:
    """Of each kind of layer how its positions turn; None where it is said in words that are not known here."""
    said, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    if said is not None and scaling is not None:
        return None
    flat = {"rope_theta": config.get("rope_theta"), **(said or scaling or {})}
    if family.model_type != "gemma3_text":
        found: dict[str | None, Any] = {None: flat}
    elif said is not None:  # of transformers 5: one for each kind of layer
        found = {kind: said.get(kind) for kind in set(read.layer_types)}
    else:
        found = {_FULL: flat, _LOCAL: {"rope_theta": config.get("rope_local_base_freq")}}
    ropes = {kind: _rope(rope) for kind, rope in found.items()}
    read.turning = read.head_dim
    shares = {float(rope.get("partial_rotary_factor") or 1) for rope in ropes.values() if rope is not None}
    share = float(config.get("partial_rotary_factor") or 1)
    share = share if shares == {1.0} else next(iter(shares)) if len(shares) == 1 else 0
    if share != 1 and family.model_type != "phi3":
        return None
    read.turning = int(read.head_dim * share)
    return None if None in ropes.values() else ropes  # type: ignore[return-value]


def _rope(said: Any) -> dict[str, Any] | None:
    if not isinstance(said, Mapping):
        return None
    kind = said.get("rope_type", said.get("type", "default"))
    needed = _ROPES.get(kind) if isinstance(kind, str) else None
    if needed is None or not all(_is_number(said.get(key)) for key in ("rope_theta", *needed)):
        return None
    return {**said, "rope_type": kind}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def give_generation(model: Any, settings: Callable[[], Mapping[str, Any]], where: str) -> None:
    """Give a model the generation config of its checkpoint.

    What is beyond a `Sampler`, or cannot be read, goes the way of transformers' models.

    Args:
        model: a bare one.
        settings: reads the contents of generation_config.json; empty where there is none.
        where: the checkpoint, for warnings.
    """
    try:
        found = settings()
    except CheckpointError:
        found = {"": None}
    found = found or {key: value for key, value in vars(model.config).items() if key in _PLAIN}
    model.generation_config = Settings(**{key: value for key, value in found.items() if key in _PLAIN})
    if not {*found} <= {*_PLAIN}:
        skeleton.give_generation(model, settings, where)


class Bare(nn.Module):
    """Embedding, layers, last norm and head of a decoder, without a way to run them."""

    def __init__(self, family: Family, config: Numbers, dtype: torch.dtype) -> None:
        super().__init__()
        self.config: Any = config
        width, tokens = config.hidden_size, config.vocab_size
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(tokens, width, dtype=dtype)
        self.model.layers = nn.ModuleList(_layer(family, config, dtype) for _ in range(config.num_hidden_layers))
        self.model.norm = Norm(width, config.rms_norm_eps, dtype)
        self.model.rotary_emb = Rotary(config.ropes, config.turning, config.max_position_embeddings)
        self.lm_head = nn.Linear(width, tokens, bias=False, dtype=dtype)
        tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
        self.all_tied_weights_keys: Any = tied

    def get_input_embeddings(self) -> nn.Module:
        """As transformers' models."""
        found: nn.Module = self.model.embed_tokens  # type: ignore[assignment]
        return found

    def get_output_embeddings(self) -> nn.Module:
        """As transformers' models."""
        return self.lm_head


def _layer(family: Family, config: Numbers, dtype: torch.dtype) -> nn.Module:
    layer, width, heads = nn.Module(), config.hidden_size, config.num_attention_heads
    biases, dim, ffn = family.biases(config), config.head_dim, config.intermediate_size
    queries, keys = heads * dim, config.num_key_value_heads * dim
    rows = (queries, keys, keys) if len(family.qkv) > 1 else (queries + 2 * keys,)

    def linear(columns: int, rows: int, name: str) -> nn.Module:
        return nn.Linear(columns, rows, bias=name in biases, dtype=dtype)

    layer.self_attn = attention = nn.Module()
    for name, count in zip(family.qkv, rows, strict=True):
        setattr(attention, name, linear(width, count, name))
    attention.o_proj = linear(queries, width, "o_proj")
    if family.head_norms:
        sizes = (queries, keys) if family.whole_norm else (dim, dim)
        attention.q_norm, attention.k_norm = (Norm(size, config.rms_norm_eps, dtype) for size in sizes)
    attention.head_dim, attention.scaling = dim, family.score_scale(config)  # type: ignore[assignment]
    layer.mlp = mlp = nn.Module()
    for name in family.gate_up:
        setattr(mlp, name, linear(width, 2 * ffn // len(family.gate_up), name))
    mlp.down_proj = linear(ffn, width, "down_proj")
    for norm in (family.before_attention, family.after_attention, family.before_mlp, family.after_mlp):
        if norm is not None:
            setattr(layer, norm, Norm(width, config.rms_norm_eps, dtype))
    return layer
