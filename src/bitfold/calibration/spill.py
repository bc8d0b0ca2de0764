"""Activations on disk: sequences of tensors of which memory holds the one at hand.

Files are read and written, not mapped: pages of a map count as resident memory, those of a file do not. float32 in,
float32 out: a run that reads its activations back gives the same bytes as one that never let go of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitfold.checkpoints.safetensors import digest_of
from bitfold.checkpoints.shards import sync_file, written_error
from bitfold.errors import CheckpointError

_counter = itertools.count()


class Stream:
    """A sequence of tensors that grows at its end.

    Args:
        path: the file; None = in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._held: list[torch.Tensor] = []
        self._at: list[tuple[int, torch.dtype, tuple[int, ...]]] = []
        self._end = 0
        if path is not None:
            path.unlink(missing_ok=True)

    @classmethod
    def opened(cls, path: Path, facts: dict[str, Any]) -> Stream | None:
        """A sequence that an earlier process sealed; None when its file is not what the facts say."""
        if not path.is_file() or digest_of(path) != facts["sha256"]:
            return None
        stream = cls()
        stream.path = path
        for dtype, shape in facts["tensors"]:
            stream._note(getattr(torch, dtype), tuple(shape))
        return stream

    def _note(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self._at.append((self._end, dtype, shape))
        self._end += int(np.prod(shape, dtype=np.int64)) * dtype.itemsize

    @classmethod
    def at(cls, path: Path, places: Iterable[tuple[int, torch.dtype, tuple[int, ...]]]) -> Stream:
        """Tensors that another process has in a file, to be read."""
        stream = cls()
        stream.path, stream._at = path, list(places)
        return stream

    def places(self) -> list[tuple[int, torch.dtype, tuple[int, ...]]]:
        """Of each tensor in the file: the byte at which it begins, dtype, shape."""
        return list(self._at)

    def append(self, tensor: torch.Tensor) -> None:
        """One more, in the memory of the CPU or on the disk; CheckpointError when that is full."""
        tensor = tensor.to("cpu")
        if self.path is None:
            self._held.append(tensor)
            return
        raw: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        try:
            with self.path.open("ab") as file:
                file.truncate(self._end)
                file.write(memoryview(raw))
        except OSError as error:
            raise written_error(error, self.path, "activations cannot be written") from error
        self._note(tensor.dtype, tuple(tensor.shape))

    def __len__(self) -> int:
        return len(self._held) if self.path is None else len(self._at)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for i in range(len(self)):
            yield self[i]

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.path is None:
            return self._held[index]
        start, dtype, shape = self._at[index]
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        raw = torch.empty(count, dtype=torch.uint8)  # aligned as all tensors are, on which the last bits of sums depend
        into: Any = raw.numpy()
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                read = file.readinto(memoryview(into))
        except OSError as error:
            raise CheckpointError(f"activations cannot be read: {error}", where=str(self.path)) from error
        if read != count:
            raise CheckpointError("activations were cut off", where=str(self.path))
        return raw.view(dtype).view(shape)

    def first(self, count: int) -> list[torch.Tensor]:
        """The first few."""
        return [self[i] for i in range(min(count, len(self)))]

    def seal(self) -> dict[str, Any]:
        """Bring it to the disk; JSON-able facts by which `opened` finds it again."""
        assert self.path is not None
        sync_file(self.path)
        tensors = [[str(dtype).removeprefix("torch."), list(shape)] for _, dtype, shape in self._at]
        return {"sha256": digest_of(self.path), "tensors": tensors}

    def drop(self) -> None:
        """Forget it, and its file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        self._held, self._at, self._end = [], [], 0


class Spill:
    """Where streams live.

    Args:
        folder: for their files; None = in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def stream(self, name: str) -> Stream:
        """A new, empty one under that name."""
        return Stream(None if self.folder is None else self.folder / f"{name}.bin")

    def scratch(self) -> Stream:
        """A new, empty one that no other process will look for."""
        return self.stream(f"scratch-{next(_counter)}")


class Keyed:
    """Tensors by number, written once each.

    Args:
        stream: where they go.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._places: dict[int, int] = {}

    def __setitem__(self, key: int, tensor: torch.Tensor) -> None:
        self._places[key] = len(self._stream)
        self._stream.append(tensor)

    def get(self, key: int) -> torch.Tensor | None:
        """The tensor of that number; None if there is none."""
        place = self._places.get(key)
        return None if place is None else self._stream[place]

    def drop(self) -> None:
        """Forget them."""
        self._stream.drop()


class Answers:
    """What a module returned, call by call: tensors, or tuples of tensors and other things.

    Args:
        stream: where the tensors go; the rest stays in memory.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._shapes: list[Any] = []

    def append(self, answer: Any) -> None:
        """One more."""
        self._shapes.append(self._put(answer))

    def _put(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            self._stream.append(value)
            return _Place(len(self._stream) - 1, value.device)
        return tuple(self._put(v) for v in value) if type(value) is tuple else value

    def _take(self, value: Any) -> Any:
        if isinstance(value, _Place):
            return self._stream[value.number].to(value.device)
        return tuple(self._take(v) for v in value) if type(value) is tuple else value

    def __len__(self) -> int:
        return len(self._shapes)

    def __iter__(self) -> Iterator[Any]:
        return (self._take(value) for value in self._shapes)

    def clear(self) -> None:
        """Forget them."""
        self._stream.drop()
        self._shapes.clear()


class _Place:
    """Stands for a tensor of the stream, and says where it was."""

    def __init__(self, number: int, device: torch.device) -> None:
        self.number, self.device = number, device
