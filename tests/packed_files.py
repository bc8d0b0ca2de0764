"""Folders of packed weights: golden ones, as their programs wrote them, and those of whole models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden" / "packed"
NAMES = sorted(file.stem for file in GOLDEN.glob("*.safetensors"))
UP = "model.layers.0.mlp.up_proj"


def golden(name: str) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    """Tensors as the program stores them, what it decodes them to, and its part of config.json."""
    with safe_open(str(GOLDEN / f"{name}.safetensors"), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    return tensors, tensors.pop("expected"), config


def write_folder(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """A folder of a Llama with these tensors."""
    path.mkdir(parents=True)
    usual = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}
    (path / "config.json").write_text(json.dumps({**usual, **config}))
    save_file({name: w.contiguous() for name, w in tensors.items()}, path / "model.safetensors")
    return path


def gptq_layer(w: Tensor, bits: int, group: int) -> tuple[dict[str, Tensor], Tensor]:
    """A weight (n, k) rounded to groups and packed as GPTQ's v1 container, bit by bit; and what it decodes to."""
    n, k = w.shape
    parts = w.view(n, -1, group)
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).half()
    zero = (-low / scale.float()).round().clamp(1, 2**bits - 1)
    codes = (parts / scale.float()[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
    decoded = ((codes - zero[..., None]) * scale.float()[..., None]).view(n, k)
    index = (torch.arange(k) // group).int()
    words = {"qweight": _words(codes.view(n, k).T, bits, 0), "qzeros": _words(zero.T - 1, bits, 1)}
    return {**words, "scales": scale.T, "g_idx": index}, decoded


def _words(codes: Tensor, bits: int, axis: int) -> Tensor:
    """int32 words of codes packed along an axis, lowest bits first: one bit after the other, as the layout says it."""
    rows = codes.long() if axis == 1 else codes.long().T
    stream = ((rows[..., None] >> torch.arange(bits)) & 1).reshape(len(rows), -1, 32)
    words = (stream << torch.arange(32)).sum(-1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    return words if axis == 1 else words.T


def gptq_model(path: Path, model: Any, bits: int = 4, group: int = 32) -> dict[str, Tensor]:
    """The folder of a model whose linear layers but the head are packed in that way; what they decode to, by name."""
    state, decoded = model.state_dict(), {}
    tensors = {name: w for name, w in state.items() if not name.endswith("_proj.weight")}
    for name in state.keys() - tensors.keys():
        parts, decoded[name] = gptq_layer(state[name], bits, group)
        tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
    said = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": False}
    config = {**model.config.to_dict(), "quantization_config": {**said, "checkpoint_format": "gptq"}}
    write_folder(path, tensors, config)
    (path / "quantize_config.json").write_text(json.dumps(said))
    return decoded
