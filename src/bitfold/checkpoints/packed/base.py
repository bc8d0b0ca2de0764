"""What a reader of another program's packed weights is made of: the checkpoint as it sees it, the weights it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from bitfold.checkpoints.foreign import HINT
from bitfold.checkpoints.headers import ForeignInfo
from bitfold.errors import CheckpointError
from bitfold.qtensor import QTensor
from bitfold.system.tensorinfo import TensorInfo

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Packed:
    """One weight of the model, as another program stores it.

    Args:
        parts: names of the stored tensors that it consists of, by what they are.
        shape: (n, k) or (experts, n, k), inputs last.
        label: what it is stored as, in a few words: "gptq, 4 bits, groups of 128".
        decode: (stored tensors by what they are) -> the weight, of `shape`: a `QTensor` where the numbers are
            exactly those of a format of bitfold, else float32.
        transposed: the model has (..., k, n).
    """

    parts: Mapping[str, str]
    shape: tuple[int, ...]
    label: str
    decode: Callable[[Parts], QTensor | Tensor]
    transposed: bool = False

    @property
    def model_shape(self) -> tuple[int, ...]:
        """Shape of the tensor of the model."""
        *lead, n, k = self.shape
        return (*lead, k, n) if self.transposed else self.shape


@dataclass(frozen=True)
class Stored:
    """A checkpoint as readers see it.

    Args:
        program: the name of who wrote it.
        settings: what its config says of the quantization.
        config: the rest of its config.json.
        infos: all its tensors, from the headers.
        read: a tensor by its name; for the few numbers without which the others cannot be told.
        where: the folder.
    """

    program: str
    settings: Mapping[str, Any]
    config: Mapping[str, Any]
    infos: Mapping[str, TensorInfo]
    read: Callable[[str], Tensor]
    where: str

    def refuse(self, what: str) -> NoReturn:
        """CheckpointError: written in a way that the reader does not cover."""
        raise CheckpointError(f"is quantized already: {self.program}, {what}", where=self.where, hint=HINT)

    def ending(self, suffix: str) -> Iterator[str]:
        """What is before a suffix in the names that have it."""
        return (name.removesuffix(suffix) for name in self.infos if name.endswith(suffix))

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return name in self.infos

    def expect(self, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]) -> tuple[int, ...]:
        """The shape of a tensor that must be there.

        Args:
            name: of the tensor.
            dtypes: any of which it may have.
            shape: which it must have; None: any size but 0.

        Raises:
            CheckpointError: it is missing, or of another dtype or shape.
        """
        info = self.infos.get(name)
        if info is None:
            raise self.damaged(name, "is missing")
        fits = len(info.shape) == len(shape) and all(a in (b, None) for b, a in zip(info.shape, shape, strict=True))
        if isinstance(info, ForeignInfo) or info.dtype not in dtypes or not fits or 0 in info.shape:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            found = info.label if isinstance(info, ForeignInfo) else str(info.dtype).removeprefix("torch.")
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise self.damaged(name, f"is {found} {info.shape}, not {wanted} ({sizes})")
        return info.shape

    def damaged(self, name: str, what: str) -> CheckpointError:
        """A tensor that is not as the program writes it."""
        return CheckpointError(f"tensor {name} of a checkpoint of {self.program} {what}", where=self.where)

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number among the settings; CheckpointError for anything else."""
        value = self.settings.get(key, default)
        if type(value) is not int:
            raise CheckpointError(f"the {key} of its {self.program} config is {str(value)[:40]}", where=self.where)
        return value
