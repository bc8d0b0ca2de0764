"""Kinds of checkpoint that can be written, by name.

Another kind is one file with a class like `SafetensorsFolder`, and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from bitfold.checkpoints.base import Target
from bitfold.checkpoints.safetensors import write_json
from bitfold.checkpoints.schema import QUANTIZATION
from bitfold.checkpoints.shards import PlannedWriter, plan_shards, written_error
from bitfold.errors import UsageError
from bitfold.system.tensorinfo import TensorInfo


class SafetensorsFolder:
    """An ordinary Hugging Face folder: safetensors in shards, an index, config.json (implements `Target`).

    Quantized weights lie in it field by field, and config.json says what they mean: that is bitfold's own checkpoint.

    Args:
        folder: an existing folder.
        max_shard_bytes: size at which a new shard is begun.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = 4 << 30) -> None:
        self.folder, self.max_shard_bytes = folder, max_shard_bytes
        self._writer: PlannedWriter | None = None

    @property
    def _open(self) -> PlannedWriter:
        assert self._writer is not None, "layout comes first"
        return self._writer

    @property
    def files(self) -> list[str]:
        """See `Target`."""
        return self._open.plan.files

    def layout(self, tensors: Mapping[str, TensorInfo]) -> None:
        """See `Target`."""
        self._writer = PlannedWriter(self.folder, plan_shards(tensors, self.max_shard_bytes))

    def write(self, name: str, parts: Iterable[torch.Tensor]) -> str:
        """See `Target`."""
        return self._open.write(name, parts)

    def digest(self, name: str) -> str:
        """See `Target`."""
        return self._open.digest(name)

    def sync(self) -> None:
        """See `Target`."""
        self._open.sync()

    def finish(self, config: Mapping[str, Any], quantization: Mapping[str, Any] | None = None) -> None:
        """See `Target`."""
        text = {key: value for key, value in config.items() if key != QUANTIZATION}
        text |= {} if quantization is None else {QUANTIZATION: quantization}
        try:
            self.sync()
            self._open.plan.write_index(self.folder)
            write_json(self.folder / "config.json", text)
        except OSError as error:
            raise written_error(error, self.folder, "cannot be completed") from error


TARGETS: dict[str, Callable[[Path, int], Target]] = {"safetensors": SafetensorsFolder}


def open_target(kind: str, folder: Path, max_shard_bytes: int) -> Target:
    """A checkpoint of that kind, to be written into a folder; UsageError for an unknown kind."""
    if kind not in TARGETS:
        raise UsageError(f"unknown kind of checkpoint {kind!r}", hint=f"one of {', '.join(TARGETS)}")
    return TARGETS[kind](folder, max_shard_bytes)
