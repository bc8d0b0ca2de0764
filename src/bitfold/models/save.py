"""Save a model whose layers were quantized in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitfold.checkpoints.schema import Entry, describe
from bitfold.checkpoints.staging import open_output, written_aside
from bitfold.checkpoints.targets import FOLDER, open_target
from bitfold.models.skeleton import tied_names, with_dtype
from bitfold.nn import QWeight
from bitfold.system.tensorinfo import TensorInfo


def save(model: nn.Module, folder: str | Path, *, max_shard_bytes: int | None = None) -> None:
    """Write a quantized model as a folder that `bitfold.load` reads.

    Args:
        model: any module; a transformers model also gets its config and generation config written.
        folder: must not exist, or be empty.
        max_shard_bytes: size at which a new shard is begun; None: SHARD_BYTES.

    Raises:
        CheckpointError: the folder exists, or cannot be written.
    """
    tensors = stored_of(model)
    with written_aside(open_output(folder)) as aside:
        target = open_target(FOLDER, aside, max_shard_bytes)
        target.layout({name: TensorInfo(w.dtype, tuple(w.shape)) for name, w in tensors.items()})
        for name, w in tensors.items():
            target.write(name, [w])
        target.finish(_config(model), quantization_of(model))
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(str(aside))


def stored_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a model, tied ones once."""
    skip, written = tuple(tied_names(model)), set()
    found: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name in skip or name.startswith(tuple(f"{s}." for s in skip)):
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in written:
            continue  # tied outside of transformers: stored once, under the first name
        written.add(key)
        found[name] = tensor
    return found


def _config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    text: dict[str, Any] = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    text.setdefault("architectures", [type(model).__name__])
    if text["architectures"] is None:
        text["architectures"] = [type(model).__name__]
    return with_dtype(text, (p.dtype for p in model.parameters()))


def quantization_of(model: nn.Module) -> dict[str, Any]:
    """The quantization_config that describes a model's quantized weights."""
    entries = {
        name: Entry(
            m.format,
            m.qshape,
            m.act,
            m.stored_transposed,
            m.transform,
            m.flat,
        )
        for name, m in model.named_modules()
        if isinstance(m, QWeight) and name not in tied_names(model)
    }
    return describe(entries, {name: "not quantized" for name, _ in model.named_parameters()})
