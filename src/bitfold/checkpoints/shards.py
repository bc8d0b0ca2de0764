"""Files of weights whose every byte has its place before the first one is written.

dtype and shape of all tensors are known beforehand, so headers, offsets and the final names of the files are as well.
Tensors can be written in any order, each once or again: the bytes of the result are the same. That makes going on after
an interruption simple: what is there and has the right hash stays, the rest is written.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from bitfold.checkpoints.headers import make_header
from bitfold.checkpoints.safetensors import write_json
from bitfold.checkpoints.weight_files import INDEX, SINGLE
from bitfold.errors import CheckpointError
from bitfold.system.tensorinfo import TensorInfo

SHARD_BYTES = 4 << 30  # a new file of a folder is begun there where nothing else is said
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_NUMBER = re.compile(r"\(os error (\d+)\)")  # as safetensors tells of an error of the system
_PIECE = 1 << 24  # bytes hashed at a time when a file is read back


@dataclass(frozen=True)
class Shard:
    """One file: its name, its header (length prefix included) and where in it each tensor begins.

    `alignment`: the file ends at a multiple of it.
    """

    name: str
    header: bytes
    starts: Mapping[str, int]
    infos: Mapping[str, TensorInfo]
    alignment: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        ends = (start + self.infos[name].nbytes for name, start in self.starts.items())
        return -(-max(ends, default=len(self.header)) // self.alignment) * self.alignment


@dataclass(frozen=True)
class ShardPlan:
    """All files of a checkpoint."""

    shards: tuple[Shard, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files, the index not counted."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def files(self) -> list[str]:
        """Names of the files."""
        return [shard.name for shard in self.shards]

    def place(self, name: str) -> tuple[Shard, int]:
        """The shard of a tensor and the byte at which it begins there."""
        shard = next(s for s in self.shards if name in s.starts)
        return shard, shard.starts[name]

    def write_index(self, folder: Path) -> None:
        """The index that a checkpoint of several files needs."""
        if len(self.shards) < 2:
            return
        weight_map = {name: shard.name for shard in self.shards for name in shard.infos}
        total = sum(info.nbytes for shard in self.shards for info in shard.infos.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def plan_shards(infos: Mapping[str, TensorInfo], max_shard_bytes: int | None) -> ShardPlan:
    """Divide tensors among the files of a folder, see `divided`; None: SHARD_BYTES."""
    groups = divided(infos, max_shard_bytes or SHARD_BYTES)
    names = numbered(SINGLE, len(groups))
    return ShardPlan(tuple(_shard(name, group) for name, group in zip(names, groups, strict=True)))


def divided(infos: Mapping[str, TensorInfo], max_bytes: int) -> list[dict[str, TensorInfo]]:
    """Tensors, in their order, in groups of at most so many bytes; a larger tensor has one for itself."""
    groups: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in infos.items():
        if groups[-1] and size + info.nbytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = info
        size += info.nbytes
    return groups


def numbered(name: str, count: int) -> list[str]:
    """Names of the files of a model: `name` where there is one, else model-00001-of-00003.gguf and so on."""
    if count == 1:
        return [name]
    path = Path(name)
    return [f"{path.stem}-{i:05d}-of-{count:05d}{path.suffix}" for i in range(1, count + 1)]


def _shard(name: str, group: Mapping[str, TensorInfo]) -> Shard:
    # Wide types first: every tensor then starts at a multiple of its item size, which zero-copy loaders need.
    order = sorted(group, key=lambda n: (-group[n].dtype.itemsize, n))
    header = make_header(order, group)
    at, starts = len(header), {}
    for tensor in order:
        starts[tensor] = at
        at += group[tensor].nbytes
    return Shard(name, header, starts, {tensor: group[tensor] for tensor in order})


class PlannedWriter:
    """Writes tensors to their places.

    Args:
        folder: an existing folder; files that are there already are written into, not replaced.
        plan: the places.

    Raises:
        CheckpointError: the files cannot be made, or a file of that name is of another plan.
    """

    def __init__(self, folder: Path, plan: ShardPlan) -> None:
        self.folder, self.plan = folder, plan
        for shard in plan.shards:
            self._prepare(folder / shard.name, shard)

    def _prepare(self, path: Path, shard: Shard) -> None:
        try:
            with path.open("r+b" if path.exists() else "w+b") as file:
                file.write(shard.header)
                file.truncate(shard.nbytes)
        except OSError as error:
            raise written_error(error, path, "cannot be written") from error

    def write(self, name: str, parts: Iterable[torch.Tensor]) -> str:
        """Put a tensor, given as consecutive pieces of its rows, in its place; returns the SHA-256 of its bytes.

        Raises:
            CheckpointError: the pieces do not make the planned tensor, or the disk is full.
        """
        shard, start = self.plan.place(name)
        info, path = shard.infos[name], self.folder / shard.name
        digest, count = hashlib.sha256(), 0
        try:
            with path.open("r+b", buffering=0) as file:
                file.seek(start)
                for part in parts:
                    raw = _bytes_of(part, info)
                    count += len(raw)
                    if count > info.nbytes:
                        break
                    digest.update(raw)
                    _write_all(file.fileno(), raw)
        except OSError as error:
            raise written_error(error, path, f"tensor {name} cannot be written") from error
        if count != info.nbytes:
            raise CheckpointError(f"tensor {name} has {count} bytes, {info.nbytes} were planned", where=str(path))
        return digest.hexdigest()

    def digest(self, name: str) -> str:
        """The SHA-256 of what stands in a tensor's place now."""
        shard, start = self.plan.place(name)
        digest, left = hashlib.sha256(), shard.infos[name].nbytes
        try:
            with (self.folder / shard.name).open("rb") as file:
                file.seek(start)
                while left > 0 and (raw := file.read(min(left, _PIECE))):
                    digest.update(raw)
                    left -= len(raw)
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error}", where=str(self.folder / shard.name)) from error
        return digest.hexdigest()

    def sync(self) -> None:
        """Wait until the files are on the disk."""
        for name in self.plan.files:
            sync_file(self.folder / name)


def _bytes_of(part: torch.Tensor, info: TensorInfo) -> memoryview:
    if part.dtype != info.dtype:
        raise CheckpointError(f"a tensor is {part.dtype}, {info.dtype} was planned")
    flat = part.detach().cpu().contiguous().reshape(-1)
    array: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return memoryview(array)


def _write_all(descriptor: int, raw: memoryview) -> None:
    while len(raw):
        raw = raw[os.write(descriptor, raw[: 1 << 30]) :]


def sync_file(path: Path) -> None:
    """fsync; errors of file systems that cannot are passed over, a full disk is not."""
    try:
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno in {*_FULL, errno.EIO}:
            raise written_error(error, path, "cannot be written") from error


def written_error(error: OSError, path: Path, what: str) -> CheckpointError:
    """The error for a file that could not be written; says what to do when the disk is full."""
    if error.errno in {*_FULL, errno.EFBIG}:
        reason = "the disk is full" if error.errno != errno.EFBIG else "files may not grow that large here"
        hint = "make room, and run the same command again"
        return CheckpointError(f"{what}: {reason}", where=str(path), hint=hint)
    return CheckpointError(f"{what}: {error}", where=str(path))


def save_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write a file of safetensors; nothing is left of one that could not be written whole.

    Raises:
        CheckpointError: see `written_error`; safetensors itself raises an error that is no OSError.
    """
    try:
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, file)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            file.unlink(missing_ok=True)
        number = _NUMBER.search(str(error))
        cause = error if isinstance(error, OSError) else OSError(int(number[1]) if number else 0, str(error))
        raise written_error(cause, file, "cannot be written") from error
