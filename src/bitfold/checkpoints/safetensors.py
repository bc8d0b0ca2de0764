"""Safetensors folders: read lazily, written shard by shard.

A folder is read through its index (`model.safetensors.index.json`), or its single file, or whatever `*.safetensors` it
holds. Headers are checked against file sizes before anything is allocated; file names in an index must stay inside
the folder. Pickles (`.bin`, `.pt`) are refused: reading one runs whatever code its author put there.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from bitfold.checkpoints.base import StoredAs
from bitfold.checkpoints.headers import ForeignInfo, data_size, read_header
from bitfold.checkpoints.schema import Content
from bitfold.checkpoints.side_files import PICKLES, copy_side_files
from bitfold.checkpoints.untrusted import read_json_object
from bitfold.checkpoints.weight_files import locate, say_what_is_left
from bitfold.errors import CheckpointError
from bitfold.system.tensorinfo import TensorInfo, require_rows
from bitfold.text.tokenizer import read_tokenizer


class SafetensorsSource:
    """A local Hugging Face folder open for reading (implements `Source`).

    Raises:
        CheckpointError: no config.json, no safetensors, a truncated or inconsistent file, an index that points outside.
    """

    model_dtype: None = None
    quantization: None = None
    packed: None = None

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_config(self.path)
        self._where = locate(self.path, self.config)
        self._info: dict[str, TensorInfo] = {}
        self._starts: dict[str, int] = {}  # where in its file each begins
        for file in dict.fromkeys(self._where.values()):
            found = read_header(file)
            at = file.stat().st_size - sum(info.nbytes for info in found.values())
            for name, info in found.items():
                if self._where.get(name) == file:
                    self._info[name], self._starts[name] = info, at
                at += info.nbytes
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
        """The tensor; its pages come from the file as they are touched and are given back with the tensor.

        Only its own bytes are mapped: experts by the thousand can be alive at once, and whole files by the thousand
        are more address space than limits on a process allow.
        """
        file, info = self._where[name], self._info[name]
        if isinstance(info, ForeignInfo):
            raise CheckpointError(f"tensor {name} is of type {info.label}, which cannot be read", where=str(file))
        try:
            return _mapped(file, self._starts[name], info)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read tensor {name}: {error}", where=str(file)) from error

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Some rows of a matrix, by their numbers in ascending order; only their bytes are read.

        Raises:
            UsageError: a row that it does not have.
        """
        file, info = self._where[name], self._info[name]
        require_rows(rows, info.shape[0], name)
        start, width = self._starts[name], info.nbytes // max(1, info.shape[0])
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

    def content(self, name: str) -> Content:
        """See `Source`."""
        return self.info(name)

    def fields(self, name: str) -> dict[str, torch.Tensor]:
        """See `Source`: nothing is packed."""
        raise KeyError(name)

    def quantized(self) -> dict[str, StoredAs]:
        """None: what others packed is another kind of source, or refused."""
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

    def tokenizer(self, *, plain: bool = False) -> Any:
        """See `Source`."""
        return read_tokenizer(self.path, plain=plain)

    def close(self) -> None:
        """Nothing stays open between reads."""


def _mapped(file: Path, start: int, info: TensorInfo) -> torch.Tensor:
    """A tensor whose bytes are those of a file, from `start` on; writing into it leaves the file as it is.

    Raises:
        OSError, ValueError: the file is shorter by now, or cannot be mapped.
    """
    if not info.nbytes:
        return torch.empty(info.shape, dtype=info.dtype)
    before = start % mmap.ALLOCATIONGRANULARITY
    with file.open("rb") as stream:
        pages = mmap.mmap(stream.fileno(), before + info.nbytes, access=mmap.ACCESS_COPY, offset=start - before)
    raw = torch.frombuffer(pages, dtype=torch.uint8, count=info.nbytes, offset=before)
    if start % info.dtype.itemsize:  # a header of an odd length
        raw = raw.clone()
    return raw.view(info.dtype).reshape(info.shape)


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


def write_json(path: Path, data: Mapping[str, Any] | Iterable[Any]) -> None:
    """Indented UTF-8 JSON with a newline at the end."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
