"""Safetensors folders: read lazily, written shard by shard.

A folder is read through its index (`model.safetensors.index.json`), or its single file, or whatever `*.safetensors` it
holds. Headers are checked against file sizes before anything is allocated; file names in an index must stay inside
the folder. Pickles (`.bin`, `.pt`) are refused: reading one runs whatever code its author put there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from bitfold.checkpoints.base import StoredAs
from bitfold.checkpoints.headers import ForeignInfo, data_size, data_start, make_header, read_header
from bitfold.checkpoints.side_files import PICKLES, copy_side_files
from bitfold.checkpoints.untrusted import read_json_object
from bitfold.checkpoints.weight_files import INDEX, SINGLE, locate, say_what_is_left
from bitfold.errors import CheckpointError
from bitfold.system.tensorinfo import TensorInfo, require_rows
from bitfold.text.tokenizer import read_tokenizer


class SafetensorsSource:
    """A local Hugging Face folder open for reading (implements `Source`).

    Raises:
        CheckpointError: no config.json, no safetensors, a truncated or inconsistent file, an index that points outside.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_config(self.path)
        self._where = locate(self.path, self.config)
        self._info: dict[str, TensorInfo] = {}
        self._open: dict[Path, Any] = {}
        for file in dict.fromkeys(self._where.values()):
            self._info.update({n: i for n, i in read_header(file).items() if self._where.get(n) == file})
        if missing := [name for name in self._where if name not in self._info]:
            raise CheckpointError(
                f"{len(missing)} tensors of the index are in no file, the first is {missing[0]}", where=str(self.path)
            )
        say_what_is_left(self.path, self.files, self.unread())

    def names(self) -> list[str]:
        """All tensor names, file by file, in the order of the data."""
        return list(self._info)

    def info(self, name: str) -> TensorInfo:
        """dtype and shape."""
        return self._info[name]

    def read(self, name: str) -> torch.Tensor:
        """The tensor; its pages come from the file as they are touched and are given back with the tensor."""
        file, info = self._where[name], self._info[name]
        if isinstance(info, ForeignInfo):
            raise CheckpointError(f"tensor {name} is of type {info.label}, which cannot be read", where=str(file))
        try:
            with safe_open(str(file), framework="pt") as handle:
                tensor: torch.Tensor = handle.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read tensor {name}: {error}", where=str(file)) from error

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Some rows of a matrix, by their numbers in ascending order; only their bytes are read.

        Raises:
            UsageError: a row that it does not have.
        """
        file, info = self._where[name], self._info[name]
        require_rows(rows, info.shape[0], name)
        start, width = data_start(file, name), info.nbytes // max(1, info.shape[0])
        out = torch.empty((len(rows), *info.shape[1:]), dtype=info.dtype)
        target: Any = out.view(-1).view(torch.uint8).numpy().reshape(len(rows), width)
        try:
            with file.open("rb", buffering=0) as stream:
                for i, row in enumerate(rows.tolist()):
                    stream.seek(start + row * width)
                    if stream.readinto(memoryview(target[i])) != width:
                        raise OSError("the file ended early")
        except OSError as error:
            raise CheckpointError(f"cannot read tensor {name}: {error}", where=str(file)) from error
        return out

    def quantized(self) -> dict[str, StoredAs]:
        """None: what others quantized is refused."""
        return {}

    def stored_bytes(self) -> dict[str, int]:
        """Bytes of every tensor."""
        return {name: info.nbytes for name, info in self._info.items()}

    def folded(self) -> dict[str, str]:
        """None: every tensor is offered."""
        return {}

    def data_bytes(self) -> int:
        """Sizes of the files without their headers."""
        return sum(data_size(file) for file in self.files)

    def unread(self) -> list[str]:
        """Files of weights in the folder that are not part of this checkpoint: other shards, pickles."""
        mine = {file.name for file in self.files}
        kinds = (".safetensors", ".gguf", *PICKLES)
        return sorted(f.name for f in self.path.iterdir() if f.name.endswith(kinds) and f.name not in mine)

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return list(dict.fromkeys(self._where.values()))

    def fingerprint(self) -> dict[str, Any]:
        """Of the config, and of each file of weights its size, time and header."""
        return {"config": digest_of(self.path / "config.json"), **{f.name: file_facts(f) for f in self.files}}

    def copy_side_files(self, out_dir: Path) -> list[str]:
        """Copy everything but weights and config.json: tokenizer, generation config, chat template, licence ..."""
        return copy_side_files(self.path, out_dir)

    def generation_config(self) -> dict[str, Any]:
        """See `Source`."""
        file = self.path / "generation_config.json"
        return read_json_object(file) if file.is_file() else {}

    def tokenizer(self) -> Any:
        """See `Source`."""
        return read_tokenizer(self.path)

    def close(self) -> None:
        """Nothing stays open between reads."""


def file_facts(file: Path, head: int = 1 << 20) -> list[Any]:
    """Size, time of the last change (ns) and a hash of the first bytes: they tell versions of a file apart."""
    status = file.stat()
    with file.open("rb") as stream:
        return [status.st_size, status.st_mtime_ns, hashlib.sha256(stream.read(head)).hexdigest()]


def digest_of(file: Path) -> str:
    """SHA-256 of a whole file."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while raw := stream.read(1 << 24):
                digest.update(raw)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(file)) from error
    return digest.hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder; CheckpointError when it is missing or not a JSON object."""
    file = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError("there is no such folder", where=str(folder))
    if not file.is_file() and (folder / "adapter_config.json").is_file():
        hint = "merge it into its base model first (merge_and_unload of PEFT)"
        raise CheckpointError("holds an adapter, not a model", where=str(folder), hint=hint)
    if not file.is_file():
        raise CheckpointError("has no config.json", where=str(folder), hint="a Hugging Face model folder has one")
    return read_json_object(file)


class ShardWriter:
    """Writes tensors into shards as they come; memory holds only the tensor being added.

    The format wants its header first and its tensors aligned, so the bytes go into a data file and are put in order
    when the shard is full. The final names (model-00001-of-00003.safetensors) are known only at the end: until then
    shards have names that no loader looks for, and an interrupted write never looks whole.

    Args:
        out_dir: an existing folder.
        max_shard_bytes: a shard is closed before it would grow past this.
    """

    def __init__(self, out_dir: Path, max_shard_bytes: int = 4 << 30) -> None:
        self.out_dir = out_dir
        self.max_shard_bytes = max_shard_bytes
        self.total = 0
        self._data: BinaryIO | None = None
        self._pending: dict[str, tuple[TensorInfo, int]] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor; CheckpointError when the disk is full or the name was written before."""
        info = TensorInfo(tensor.dtype, tuple(tensor.shape))
        if self._pending and self._pending_bytes + info.nbytes > self.max_shard_bytes:
            self._flush()
        if name in self._pending or any(name in names for _, names in self._shards):
            raise CheckpointError(f"tensor {name} is written twice", where=str(self.out_dir))
        try:
            if self._data is None:
                self._data = self._path("data").open("w+b")
            if info.nbytes:
                tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tofile(self._data)
        except OSError as error:
            raise CheckpointError(f"tensor {name} cannot be written: {error}", where=str(self.out_dir)) from error
        self._pending[name] = (info, self._pending_bytes)
        self._pending_bytes += info.nbytes
        self.total += info.nbytes

    def _path(self, suffix: str) -> Path:
        return self.out_dir / f"shard-{len(self._shards) + 1:05d}.{suffix}"

    def _flush(self) -> None:
        path = self._path("partial")
        # Wide types first: every tensor then starts at a multiple of its item size, which zero-copy loaders need.
        order = sorted(self._pending, key=lambda n: (-self._pending[n][0].dtype.itemsize, n))
        try:
            with path.open("wb") as out:
                out.write(make_header(order, {name: info for name, (info, _) in self._pending.items()}))
                for name in order if self._data else ():
                    info, start = self._pending[name]
                    _copy_range(self._data, out, start, info.nbytes)
            if self._data is not None:
                self._data.close()
                self._path("data").unlink()
        except OSError as error:
            raise CheckpointError(f"cannot be written: {error}", where=str(path)) from error
        self._shards.append((path, order))
        self._data, self._pending, self._pending_bytes = None, {}, 0

    def close(self) -> list[str]:
        """Write the last shard, give all of them their names, write the index; returns the file names."""
        if self._pending or not self._shards:
            self._flush()
        if len(self._shards) == 1:
            self._shards[0][0].rename(self.out_dir / SINGLE)
            return [SINGLE]
        count, weight_map = len(self._shards), {}
        for i, (path, names) in enumerate(self._shards, 1):
            final = f"model-{i:05d}-of-{count:05d}.safetensors"
            path.rename(self.out_dir / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.out_dir / INDEX, index)
        return sorted(set(weight_map.values()))


def _copy_range(source: BinaryIO | None, out: BinaryIO, start: int, length: int) -> None:
    assert source is not None
    source.seek(start)
    while length > 0:
        chunk = source.read(min(length, 1 << 22))
        if not chunk:
            raise OSError("the data file ended early")
        out.write(chunk)
        length -= len(chunk)


def write_json(path: Path, data: Mapping[str, Any] | Iterable[Any]) -> None:
    """Indented UTF-8 JSON with a newline at the end."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
