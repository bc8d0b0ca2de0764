"""An adapter as PEFT wrote it, read as what it adds to the weights of its base."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from bitfold.checkpoints.bitfold_folder import QuantizedSource
from bitfold.checkpoints.schema import Content
from bitfold.checkpoints.untrusted import read_json_object
from bitfold.errors import CheckpointError, UsageError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# What an adapter may have beside the two matrices; of each, what it is where there is none of it.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "use_dora": (False, None), "bias": ("none", None), "lora_bias": (False, None),
    "modules_to_save": (None, []), "alpha_pattern": (None, {}), "alora_invocation_tokens": (None,),
}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """What is added to weights.

    Args:
        path: its folder.
        parts: for each layer, by its path, A float32 (rank, k) and B (n, rank).
        scaling: W + scaling * B A.
    """

    path: Path
    parts: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    scaling: Mapping[str, float]

    def delta(self, tensor: str) -> torch.Tensor | None:
        """float32 (n, k) to be added to a weight; None where there is nothing."""
        path = tensor.removesuffix(".weight")
        if not tensor.endswith(".weight") or path not in self.parts:
            return None
        a, b = self.parts[path]
        return self.scaling[path] * (b @ a)


def read_adapter(folder: str | Path) -> Adapter:
    """The adapter of a folder.

    Raises:
        CheckpointError: there is none, or its files cannot be read.
        UsageError: it is more than two matrices for each layer.
    """
    path = Path(folder)
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        hint = "`bitfold finetune` makes such folders, and PEFT's save_pretrained"
        raise CheckpointError(f"is no adapter: it needs {CONFIG} and {WEIGHTS}", where=str(folder), hint=hint)
    config = read_json_object(path / CONFIG)
    for key, plain in _PLAIN.items():
        if key in config and config[key] not in plain:
            what = f"cannot be merged: {key} = {json.dumps(config[key])}; only plain LoRA can"
            raise UsageError(what, where=str(path / CONFIG))
    try:
        stored = load_file(path / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(path / WEIGHTS)) from error
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, w in stored.items():
        if name.endswith(".base_layer.weight"):  # PEFT saves heads along, as they are in the base
            continue
        match = _KEY.fullmatch(name)
        if match is None or w.dim() != 2:
            raise UsageError(f"cannot be merged: {name} is no matrix of a linear layer's LoRA", where=str(path))
        found.setdefault(match[1], {})[match[2]] = w.float()
    parts = {layer: (pair["A"], pair["B"]) for layer, pair in found.items() if set(pair) == {"A", "B"}}
    if not parts or len(parts) < len(found) or any(len(a) != b.shape[1] for a, b in parts.values()):
        raise CheckpointError("is damaged: matrices are missing or misshapen", where=str(path / WEIGHTS))
    alpha, slow = float(config.get("lora_alpha") or 1), bool(config.get("use_rslora"))
    scaling = {layer: alpha / (len(a) ** 0.5 if slow else len(a)) for layer, (a, _) in parts.items()}
    return Adapter(path, parts, scaling)


class MergedSource(QuantizedSource):
    """A folder of ours as its adapter makes it: what it reads is base + adapter, in float32.

    Args:
        base: the folder.
        adapter: of that folder.

    Raises:
        UsageError: it is the adapter of another model.
    """

    def __init__(self, base: Path, adapter: Adapter) -> None:
        super().__init__(base)
        self.adapter, known = adapter, set(self.names())
        for layer, (a, b) in adapter.parts.items():
            name = f"{layer}.weight"
            hint = f"is {base} what {adapter.path} was trained on?"
            if name not in known:
                raise UsageError(f"the base has no weight {name}", where=str(adapter.path), hint=hint)
            shape, entry = (b.shape[0], a.shape[1]), self.entries.get(name)
            own = tuple(self.info(name).shape) if entry is None else entry.shape
            if own != shape:
                raise UsageError(f"{name} is {own} in the base, {shape} here", where=str(adapter.path), hint=hint)

    @property
    def changed(self) -> list[str]:
        """Names of the tensors to which something is added."""
        return [f"{layer}.weight" for layer in self.adapter.parts]

    def content(self, name: str) -> Content:
        """See `Source`: a sum is floating point, whatever its base is stored in, or nobody would round it again."""
        return self.info(name) if self._adds_to(name) else super().content(name)

    def _adds_to(self, name: str) -> bool:
        return name.removesuffix(".weight") in self.adapter.parts

    def read(self, name: str) -> torch.Tensor:
        """The tensor, with what is added to it."""
        w, delta = super().read(name), self.adapter.delta(name)
        if delta is None:
            return w
        entry = self.entries.get(name)
        return (w + (delta.T if entry is not None and entry.transposed else delta)).to(w.dtype)
