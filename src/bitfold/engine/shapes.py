"""Models of known shapes with random packed weights: speed does not depend on what the numbers are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bitfold.checkpoints.schema import Entry
from bitfold.errors import UsageError
from bitfold.formats import get_format
from bitfold.models import skeleton
from bitfold.models.sites import EMBEDDING, find_sites
from bitfold.models.swap import swap_entries
from bitfold.transforms import Hadamard

_LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
_QWEN2: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16"}


def _sizes(
    hidden: int, ffn: int, layers: int, heads: tuple[int, int], vocabulary: int, *, tied: bool
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 131072,
    }


# Shapes of published models, from their config.json.
SHAPES: dict[str, dict[str, Any]] = {
    "smollm-135m": {**_LLAMA, **_sizes(576, 1536, 30, (9, 3), 49152, tied=True)},
    "qwen-0.5b": {**_QWEN2, **_sizes(896, 4864, 24, (14, 2), 151936, tied=True)},
    "llama-1b": {**_LLAMA, **_sizes(2048, 8192, 16, (32, 8), 128256, tied=True), "head_dim": 64},
    "llama-3b": {**_LLAMA, **_sizes(3072, 8192, 28, (24, 8), 128256, tied=True), "head_dim": 128},
    "llama-8b": {**_LLAMA, **_sizes(4096, 14336, 32, (32, 8), 128256, tied=False), "head_dim": 128},
}


_BYTES = 243  # of which each is five codes of three values, too


def random_model(shape: str, format: str, embedding: str = "int8") -> nn.Module:
    """A model of that shape, its weights random in that format.

    Args:
        shape: a name of `SHAPES`.
        format: of the linear layers; trellis codes come with rotated inputs, all with activations in 8 bits.
        embedding: format of the embedding and the output head.

    Raises:
        UsageError: an unknown shape.
        FormatError: an unknown format.
    """
    if shape not in SHAPES:
        raise UsageError(f"unknown shape {shape!r}", where="--shape", hint=f"one of {', '.join(SHAPES)}")
    model = skeleton.of_config(SHAPES[shape], shape, dtype=torch.bfloat16)
    assert model is not None
    entries = {}
    for site in find_sites(model):
        chosen = get_format(embedding if site.kind == EMBEDDING or site.keep else format)
        rotation = Hadamard(site.qshape[-1], 0) if chosen.code is not None else None
        act = "float" if site.kind == EMBEDDING and not site.aliases else "int8"
        entries[site.tensor] = Entry(chosen, site.qshape, act, site.transposed, rotation)
    swap_entries(model, entries)  # of an embedding and its tied head one weight
    _fill(model)
    return model.eval()


def _fill(model: nn.Module) -> None:
    """Give every tensor of the skeleton a value: codes any, scales and norms small numbers."""
    random = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.dtype == torch.uint8:
            state[name] = torch.randint(0, _BYTES, tensor.shape, dtype=torch.uint8, generator=random)
            if tensor.ndim > 1:
                state[name][..., -1] = 0  # what fills up the last byte of a row has to be
        else:
            state[name] = torch.full(tensor.shape, 0.01, dtype=tensor.dtype)
    model.load_state_dict(state, strict=True, assign=True)
