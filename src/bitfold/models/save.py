"""Save a model whose layers were quantized in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from bitfold.checkpoints.bitfold_folder import QUANT_METHOD, VERSION
from bitfold.checkpoints.safetensors import ShardWriter, write_json
from bitfold.checkpoints.schema import Entry
from bitfold.checkpoints.staging import open_output, written_aside
from bitfold.models.skeleton import tied_names, with_dtype
from bitfold.nn import QWeight
from bitfold.version import __version__


def save(model: nn.Module, folder: str | Path, *, max_shard_bytes: int = 4 << 30) -> None:
    """Write a quantized model as a folder that `bitfold.load` reads.

    Args:
        model: any module; a transformers model also gets its config and generation config written.
        folder: must not exist, or be empty.
        max_shard_bytes: size at which a new shard is begun.

    Raises:
        CheckpointError: the folder exists, or cannot be written.
    """
    with written_aside(open_output(folder)) as aside:
        _write_tensors(model, aside, max_shard_bytes)
        write_json(aside / "config.json", _config(model))
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(str(aside))


def _write_tensors(model: nn.Module, folder: Path, max_shard_bytes: int) -> None:
    writer = ShardWriter(folder, max_shard_bytes)
    skip, written = tuple(tied_names(model)), set()
    for name, tensor in model.state_dict().items():
        if name in skip or name.startswith(tuple(f"{s}." for s in skip)):
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in written:
            continue  # tied outside of transformers: stored once, under the first name
        written.add(key)
        writer.add(name, tensor)
    writer.close()


def _config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    text: dict[str, Any] = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    text.setdefault("architectures", [type(model).__name__])
    if text["architectures"] is None:
        text["architectures"] = [type(model).__name__]
    text = with_dtype(text, (p.dtype for p in model.parameters()))
    return {**text, "quantization_config": quantization_of(model)}


def quantization_of(model: nn.Module) -> dict[str, Any]:
    """The quantization_config that describes a model's quantized weights."""
    entries = {
        name: Entry(
            m.format,
            m.qshape,
            m.act,
            m.stored_transposed,
            m.transform,
        )
        for name, m in model.named_modules()
        if isinstance(m, QWeight) and name not in tied_names(model)
    }
    return {
        "quant_method": QUANT_METHOD,
        "version": VERSION,
        "bitfold": __version__,
        "formats": {e.format.name: e.format.describe() for e in entries.values()},
        "tensors": {name: entry.to_dict() for name, entry in entries.items()},
        "kept": {name: "not quantized" for name, _ in model.named_parameters()},
        "unused": [],
    }
