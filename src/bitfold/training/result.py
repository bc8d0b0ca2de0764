"""The folder that a distillation ends with: the student's, with other scales, norms and biases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bitfold.checkpoints.bitfold_folder import QuantizedSource
from bitfold.checkpoints.manifest import carry_manifest
from bitfold.checkpoints.targets import FOLDER, open_target
from bitfold.records.card import carry_card
from bitfold.records.record import carry_record
from bitfold.training.course import Learned

_FACTS = ("teacher", "kl_before", "kl_after", "steps", "best", "windows", "tokens")  # what config.json says of it


def write_result(source: QuantizedSource, folder: Path, learned: Learned, facts: Mapping[str, Any]) -> None:
    """Write it.

    Args:
        source: the student.
        folder: an existing one, empty.
        learned: factors of rows by tensor, float32 (n, 1); norms and biases by name.
        facts: about the distillation, for the record of the folder.

    Raises:
        FormatError: a scale that its format cannot hold.
        CheckpointError: the disk is full.
    """
    target = open_target(FOLDER, folder, None)
    target.layout({name: source.content(name) for name in source.names()})
    for name in source.names():
        entry = source.entries.get(name)
        if entry is None:
            w = source.read(name)
            target.write(name, [learned.values[name].to(w.dtype) if name in learned.values else w])
            continue
        fields = source.fields(name)
        if (factor := learned.values.get(name)) is not None:
            sides = {side: fields[side] for side in entry.sides()}
            own = {field: w for field, w in fields.items() if field not in sides}
            fields = {**_rescaled(entry.format, own, factor), **sides}
        target.pack(name, fields)
    source.copy_side_files(folder)
    short = {key: facts[key] for key in _FACTS}
    target.finish(source.config, {**(source.quantization or {}), "distilled": short})
    carry_card(source.path, folder, _line(facts))
    carry_record(source.path, folder, {"distill": {**facts, "output": None}})
    carry_manifest(source.path, folder)


def _rescaled(format: Any, fields: Mapping[str, torch.Tensor], factor: torch.Tensor) -> dict[str, torch.Tensor]:
    assert format.rescaled is not None
    found: dict[str, torch.Tensor] = format.rescaled(fields, factor)
    return found


def _line(facts: Mapping[str, Any]) -> str:
    tokens = facts["windows"] * facts["tokens"]
    change = f"held-out KL {facts['kl_before']:.4f} before, {facts['kl_after']:.4f} after"
    return f"* scales and norms distilled from {facts['teacher']} on {tokens} tokens: {change}"
