"""What every checkpoint reader offers: names, facts and tensors, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from bitfold.checkpoints.schema import Content
from bitfold.qtensor import QTensor
from bitfold.system.tensorinfo import TensorInfo

__all__ = ["Source", "StoredAs", "Target", "TensorInfo"]


class StoredAs(NamedTuple):
    """How a quantized tensor is stored: the name of its format, and bits per weight, scales included."""

    format: str
    bpw: float


class Source(Protocol):
    """A checkpoint open for reading; nothing but headers is in memory until `read` is called.

    What not every checkpoint can do is None where it cannot.
    """

    path: Path
    config: dict[str, Any]

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        ...

    @property
    def read_rows(self) -> Callable[[str, torch.Tensor], torch.Tensor] | None:
        """`read(name)[rows]` of ascending rows, reading only the bytes of these; None: tensors come whole."""
        ...

    @property
    def packed(self) -> Callable[[str], QTensor | torch.Tensor] | None:
        """A tensor as it lies in the files where that is one of our formats, and the model it makes runs on it; else as
        `read` gives it. None: nothing is packed in a way that a model can be made of."""
        ...

    @property
    def model_dtype(self) -> torch.dtype | None:
        """What the model computes in, where that is not what `info` says of its tensors; None: it is."""
        ...

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The `quantization_config` of a checkpoint that bitfold quantized; None: of others."""
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

    def content(self, name: str) -> Content:
        """How it is stored: an entry where in packed codes, else dtype and shape of the numbers that `read` returns."""
        ...

    def fields(self, name: str) -> dict[str, torch.Tensor]:
        """What a packed tensor consists of, for `Target.pack`; only of those whose `content` is an entry."""
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

    def tokenizer(self, *, plain: bool = False) -> Any:
        """The tokenizer of transformers; CheckpointError, in words, where there is none that can be read.

        Args:
            plain: a `PlainTokenizer` will do, where it makes the same tokens: it is there in a fraction of the time.
        """
        ...

    def close(self) -> None:
        """Release files and maps."""
        ...


class Target(Protocol):
    """A checkpoint being written: what it will hold first, then tensors in any order, then what makes it whole.

    How it names, lays out and interleaves what a packed weight consists of is known to it alone.

    Args:
        folder: an existing folder, unless only sizes are asked for.
        max_shard_bytes: size at which a new file is begun; None: as is usual of the kind.
        source: what it is made of, for kinds that hold config and tokenizer as well.
        variant: of the kind, where it has any.
    """

    but_for: str  # what of packed tensors it may not take bit by bit, in words, once `layout` was called; mostly empty
    rounded: dict[str, float]  # |w - w'|^2 / |w|^2 of packed tensors that it could not take as they were, once packed

    def __init__(
        self, folder: Path, max_shard_bytes: int | None, source: Source | None = None, variant: str = ""
    ) -> None: ...

    @property
    def single(self) -> str | None:
        """Name of the one file that is all of it, its parts going by its stem if there are several; None: it is a
        folder, side files and all."""
        ...

    @property
    def files(self) -> list[str]:
        """Names of the files of weights, once `layout` was called."""
        ...

    def plain(self, info: TensorInfo) -> TensorInfo:
        """What a tensor that is not quantized is stored as."""
        ...

    def engines(self) -> dict[str, str]:
        """Who else loads it, once `stored` or `size` was called: "yes" or "no", and why."""
        ...

    def stored(self, contents: Mapping[str, Content]) -> dict[str, TensorInfo]:
        """The tensors that its files will hold, by the names that they have there."""
        ...

    def size(self, contents: Mapping[str, Content]) -> int:
        """Bytes of its files of weights, headers included."""
        ...

    def layout(self, contents: Mapping[str, Content]) -> None:
        """Give every tensor of the model its place; files that are there already are written into, not replaced.

        Raises:
            CheckpointError: the files cannot be made, or are of another plan.
        """
        ...

    def write(self, name: str, parts: Iterable[torch.Tensor]) -> dict[str, str]:
        """Put a plain tensor, given as consecutive pieces of its rows, in its place.

        Returns:
            The SHA-256 of its bytes, by stored name, as of `pack`.

        Raises:
            CheckpointError: the pieces do not make the planned tensor, or the disk is full.
        """
        ...

    def pack(self, name: str, fields: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """Put a packed tensor in its place: the fields of its format, and those beside them.

        Raises:
            CheckpointError: the fields are not those of the planned tensor, or the disk is full.
        """
        ...

    def digest(self, stored: str) -> str:
        """The SHA-256 of what stands in the place of a stored tensor now."""
        ...

    def held(self) -> dict[str, int]:
        """Bytes of every stored tensor, read back from the files."""
        ...

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        ...

    def finish(self, config: Mapping[str, Any], quantization: Mapping[str, Any] | None = None) -> None:
        """Write all that a loader needs beside the tensors: index and config.

        Args:
            config: of the model, as its config.json has it.
            quantization: from `schema.describe`; None for plain weights.
        """
        ...
