"""An ordinary Hugging Face folder being written (implements `Target`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from bitfold.checkpoints.base import Source
from bitfold.checkpoints.headers import read_header
from bitfold.checkpoints.safetensors import write_json
from bitfold.checkpoints.schema import QUANTIZATION, Content, Entry, stored_name
from bitfold.checkpoints.shards import PlannedWriter, plan_shards, written_error
from bitfold.errors import CheckpointError
from bitfold.system.tensorinfo import TensorInfo


class SafetensorsFolder:
    """An ordinary Hugging Face folder: safetensors in shards, an index, config.json (implements `Target`).

    Quantized weights lie in it field by field, and config.json says what they mean: that is bitfold's own checkpoint.

    Args:
        folder: an existing folder.
        max_shard_bytes: size at which a new shard is begun; None: SHARD_BYTES.
        source, variant: not used: config and tokenizer are files of their own, and there is one variant.
    """

    single: str | None = None

    def __init__(
        self, folder: Path, max_shard_bytes: int | None, source: Source | None = None, variant: str = ""
    ) -> None:
        self.folder, self.max_shard_bytes = folder, max_shard_bytes
        self._writer: PlannedWriter | None = None
        self._packed: dict[str, set[str]] = {}  # names of the fields of each packed tensor
        self._any_packed = False
        self.but_for = ""
        self.rounded: dict[str, float] = {}

    @property
    def _open(self) -> PlannedWriter:
        assert self._writer is not None, "layout comes first"
        return self._writer

    @property
    def files(self) -> list[str]:
        """See `Target`."""
        return self._open.plan.files

    def plain(self, info: TensorInfo) -> TensorInfo:
        """See `Target`: as it is."""
        return info

    def stored(self, contents: Mapping[str, Content]) -> dict[str, TensorInfo]:
        """See `Target`: a packed tensor X is X.codes, X.scale ..."""
        found: dict[str, TensorInfo] = {}
        for name, content in contents.items():
            found |= content.stored(name) if isinstance(content, Entry) else {name: content}
        self._any_packed = any(isinstance(content, Entry) for content in contents.values())
        return found

    def engines(self) -> dict[str, str]:
        """See `Target`."""
        if not self._any_packed:
            return {"transformers": "yes", "vLLM": "yes"}
        here = "yes, where bitfold is installed"
        return {"transformers": here, "vLLM": f"{here}: on a CPU packed, elsewhere decoded as it is loaded"}

    def size(self, contents: Mapping[str, Content]) -> int:
        """See `Target`."""
        return plan_shards(self.stored(contents), self.max_shard_bytes).nbytes

    def layout(self, contents: Mapping[str, Content]) -> None:
        """See `Target`."""
        self._writer = PlannedWriter(self.folder, plan_shards(self.stored(contents), self.max_shard_bytes))
        self._packed = {name: set(c.stored(name)) for name, c in contents.items() if isinstance(c, Entry)}

    def write(self, name: str, parts: Iterable[torch.Tensor]) -> dict[str, str]:
        """See `Target`."""
        return {name: self._open.write(name, parts)}

    def pack(self, name: str, fields: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """See `Target`."""
        named = {stored_name(name, field): value for field, value in fields.items()}
        if named.keys() != self._packed[name]:
            what = f"is packed as {sorted(named)}, {sorted(self._packed[name])} were planned"
            raise CheckpointError(what, where=f"{self.folder}: {name}")
        return {stored: self._open.write(stored, [value]) for stored, value in named.items()}

    def digest(self, stored: str) -> str:
        """See `Target`."""
        return self._open.digest(stored)

    def held(self) -> dict[str, int]:
        """See `Target`."""
        headers = (read_header(self.folder / file) for file in self.files)
        return {name: info.nbytes for header in headers for name, info in header.items()}

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
