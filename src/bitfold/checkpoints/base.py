"""What every checkpoint reader offers: names, facts and tensors, one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from bitfold.system.tensorinfo import TensorInfo

__all__ = ["Source", "StoredAs", "TensorInfo"]


class StoredAs(NamedTuple):
    """How a quantized tensor is stored: the name of its format, and bits per weight, scales included."""

    format: str
    bpw: float


class Source(Protocol):
    """A checkpoint open for reading; nothing but headers is in memory until `read` is called."""

    path: Path
    config: dict[str, Any]

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        ...

    def names(self) -> list[str]:
        """Names of all tensors, in the order in which they are best read."""
        ...

    def info(self, name: str) -> TensorInfo:
        """dtype and shape of the tensor that `read(name)` would return."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """The tensor itself, in memory of its own."""
        ...

    def quantized(self) -> dict[str, StoredAs]:
        """Tensors that are stored in fewer bits than `read` returns, by name."""
        ...

    def stored_bytes(self) -> dict[str, int]:
        """Bytes of every tensor in the files, in their order; also of those that `names` does not offer."""
        ...

    def folded(self) -> dict[str, str]:
        """Tensors in the files that `names` does not offer, because they became part of the config; and the reason."""
        ...

    def data_bytes(self) -> int:
        """Bytes of all tensors, counted from the sizes of the files."""
        ...

    def unread(self) -> list[str]:
        """Files of weights that lie beside the checkpoint and are not part of it."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """JSON-able facts that change when the checkpoint does: sizes, times and headers of files, the config."""
        ...

    def copy_side_files(self, out_dir: Path) -> list[str]:
        """Copy or write tokenizer, generation config, chat template ... to out_dir (all but weights and config.json).

        Returns the names of the files written.
        """
        ...

    def generation_config(self) -> dict[str, Any]:
        """Contents of its generation_config.json; empty where it has none."""
        ...

    def tokenizer(self) -> Any:
        """The tokenizer of transformers; CheckpointError, in words, where there is none that can be read."""
        ...

    def close(self) -> None:
        """Release files and maps."""
        ...
