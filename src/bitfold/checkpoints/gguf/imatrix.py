"""Importance matrices: the mean squares of the inputs of each weight, in llama.cpp's two forms, read without trust.

The one is a GGUF file with two tensors for each weight, the sums of the squares (`.in_sum2`) and how many inputs were
summed (`.counts`); the other, older, a list of names and float32 numbers. What bitfold knows beyond that, what an error
costs, lies in the GGUF form beside them (`.cost`, `.row_cost`), where llama.cpp does not look.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitfold.checkpoints.gguf.container import Laid, plan_parts
from bitfold.checkpoints.gguf.file import GgufFile, GgufTensor
from bitfold.checkpoints.shards import PlannedWriter
from bitfold.checkpoints.staging import open_output, written_aside
from bitfold.errors import CheckpointError
from bitfold.system.tensorinfo import TensorInfo

OLD_FORM = ".dat"
_KIND = "imatrix"
_SUMS, _COUNTS, _COST, _ROWS = ".in_sum2", ".counts", ".cost", ".row_cost"
_LONGEST_NAME, _MOST_ENTRIES = 256, 1 << 20


@dataclass(frozen=True)
class Importance:
    """What is known of the inputs of one weight (n, k), or of a stack of experts (e, n, k).

    Args:
        squares: float32 (k,) or (e, k): means of their squares over all tokens.
        costs: float32 (k,): what the square of an error in that column costs, in nats a token; None: not known.
        rows: float32 (n,): factors on it for each row; None: all rows alike.
    """

    squares: torch.Tensor
    costs: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    @property
    def weights(self) -> torch.Tensor:
        """By what errors are weighed, column by column: costs where they are known."""
        return self.squares if self.costs is None else self.costs


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix.

    Args:
        entries: by the names that tensors have in GGUF files.
        tokens: how many were looked at.
        window: tokens of a window; 0 = not known.
        texts: names of the texts.
    """

    entries: Mapping[str, Importance]
    tokens: int
    window: int = 0
    texts: tuple[str, ...] = field(default=())


def read_imatrix(path: str | Path) -> Imatrix:
    """Either form.

    Raises:
        CheckpointError: not an importance matrix, or a damaged one.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"cannot be opened: {error.strerror or error}", where=str(path)) from error
    return _read_new(path) if magic == b"GGUF" else _Old(path).read()


def _read_new(path: Path) -> Imatrix:
    file = GgufFile(path)
    try:
        if file.metadata.get("general.type") != _KIND:
            hint = "llama-imatrix makes such files, and `bitfold imatrix`"
            raise CheckpointError("is a GGUF file, but no importance matrix", where=str(path), hint=hint)
        names = [name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)]
        entries = {name: _entry(file, name) for name in names}
        counts = [_values(file, name + _COUNTS).max() for name in names]
        window = file.metadata.get("imatrix.chunk_size", 0)
        texts = file.metadata.get("imatrix.datasets", [])
    finally:
        file.close()
    if not entries:
        raise _damaged(path, "holds no entries")
    known = isinstance(texts, list) and all(isinstance(t, str) for t in texts)
    size = window if isinstance(window, int) else 0
    return Imatrix(entries, int(max(counts)), size, tuple(texts) if known else ())


def _entry(file: GgufFile, name: str) -> Importance:
    sums, counts = (_values(file, name + end) for end in (_SUMS, _COUNTS))
    if sums.dim() > 2 or counts.numel() != (len(sums) if sums.dim() == 2 else 1):
        raise _damaged(file.path, f"has {tuple(sums.shape)} sums and {tuple(counts.shape)} counts", name)
    counts = counts.reshape(-1, 1)
    # Experts that no token was sent to: all their inputs alike, as llama.cpp has it.
    squares = torch.where(counts > 0, sums.view(len(counts), -1) / counts.clamp_min(1), 1.0)
    cost, rows = (_values(file, name + end) if name + end in file.tensors else None for end in (_COST, _ROWS))
    if (cost is not None and cost.shape != squares.shape[1:]) or (rows is not None and rows.dim() != 1):
        raise _damaged(file.path, "has costs of another shape than its sums", name)
    return Importance(squares[0] if len(squares) == 1 else squares, cost, rows)


def _values(file: GgufFile, name: str) -> torch.Tensor:
    tensor: GgufTensor | None = file.tensors.get(name)
    if tensor is None or tensor.type != "f32":
        raise _damaged(file.path, "is missing" if tensor is None else f"is {tensor.type}, not float32", name)
    shape = tensor.shape if len(tensor.shape) == 1 or tensor.shape[0] > 1 else tensor.shape[1:]
    return _sound(torch.frombuffer(file.raw(tensor), dtype=torch.float32).view(shape), file.path, name)


def _sound(values: torch.Tensor, path: Path, name: str) -> torch.Tensor:
    if not bool((torch.isfinite(values) & (values >= 0)).all()):
        raise _damaged(path, "has numbers that are no squares: negative, or not finite", name)
    return values


def _damaged(path: Path, what: str, name: str = "") -> CheckpointError:
    where = f"{path}: {name!r}" if name else str(path)
    return CheckpointError(what, where=where, hint="the file is damaged, or no importance matrix")


class _Old:
    """The older form: int32 count; for each entry the length of a name, the name, calls, values, float32 values.

    The values are means times calls. At the end, which may be missing: calls, and the name of the text.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0
        try:
            self._data = memoryview(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror or error}", where=str(path)) from error

    def read(self) -> Imatrix:
        count = self._number("the count of entries", 1, _MOST_ENTRIES)
        entries = dict(self._entry() for _ in range(count))
        if len(entries) != count:
            raise _damaged(self._path, "names an entry twice")
        calls, text = 0, ""
        if self._at < len(self._data):
            calls = self._number("the number of calls", 0, 2**31 - 1)
            length = self._number("the name of the text", 0, len(self._data))
            text = bytes(self._take(length, "the name of the text")).decode("utf-8", "replace")
        return Imatrix(entries, calls, 0, (text,) if text else ())

    def _entry(self) -> tuple[str, Importance]:
        raw = bytes(self._take(self._number("the length of a name", 1, _LONGEST_NAME), "a name"))
        try:
            name = raw.decode()
        except UnicodeDecodeError as error:
            raise _damaged(self._path, "has a name that is no text") from error
        calls = self._number(f"the calls of {name!r}", 0, 2**31 - 1)
        size = self._number(f"the size of {name!r}", 1, len(self._data) // 4)
        raw_values = np.frombuffer(self._take(4 * size, name), "<f4").copy()
        values = _sound(torch.from_numpy(raw_values), self._path, name)
        return name, Importance(values / max(1, calls))

    def _number(self, what: str, least: int, most: int) -> int:
        (found,) = struct.unpack("<i", self._take(4, what))
        if not least <= found <= most:
            raise _damaged(self._path, f"{what} is {found}")
        return int(found)

    def _take(self, count: int, what: str) -> memoryview:
        if count > len(self._data) - self._at:
            raise _damaged(self._path, f"ends within {what}")
        self._at += count
        return self._data[self._at - count : self._at]


def write_imatrix(path: str | Path, found: Imatrix) -> None:
    """The older form where the name ends in .dat, which has no room for costs; else GGUF.

    Raises:
        CheckpointError: the file exists, or cannot be written.
    """
    place = open_output(path, single=True)
    with written_aside(place, place.name) as folder:
        if place.suffix == OLD_FORM:
            (folder / place.name).write_bytes(_old_bytes(found))
            return
        _write_new(folder, place.name, found)


def _write_new(folder: Path, name: str, found: Imatrix) -> None:
    chunks = found.tokens // found.window if found.window else 0
    metadata: dict[str, Any] = {"general.type": _KIND, "imatrix.datasets": list(found.texts)}
    metadata |= {"imatrix.chunk_count": chunks, "imatrix.chunk_size": found.window}
    tensors = dict(pair for key in sorted(found.entries) for pair in _tensors(key, found.entries[key], found.tokens))
    laid = {key: Laid("f32", tuple(w.shape), TensorInfo(w.dtype, tuple(w.shape))) for key, w in tensors.items()}
    writer = PlannedWriter(folder, plan_parts(name, metadata, laid))
    for key, w in tensors.items():
        writer.write(key, [w])
    writer.sync()


def _tensors(name: str, entry: Importance, tokens: int) -> list[tuple[str, torch.Tensor]]:
    squares = entry.squares if entry.squares.dim() == 2 else entry.squares[None]
    counts = torch.full((len(squares), 1), float(tokens))
    found = [(name + _SUMS, squares.float() * tokens), (name + _COUNTS, counts)]
    beside = ((_COST, entry.costs), (_ROWS, entry.rows))
    return found + [(name + end, values.float()) for end, values in beside if values is not None]


def _old_bytes(found: Imatrix) -> bytes:
    calls = max(1, found.tokens // found.window if found.window else 1)
    parts = [struct.pack("<i", len(found.entries))]
    for name in sorted(found.entries):
        values = found.entries[name].squares.float().flatten() * calls
        raw = name.encode()
        parts += [struct.pack("<i", len(raw)), raw, struct.pack("<ii", calls, len(values)), values.numpy().tobytes()]
    text = (found.texts[-1] if found.texts else "").encode()
    return b"".join([*parts, struct.pack("<ii", calls, len(text)), text])
