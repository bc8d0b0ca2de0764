"""A model in one GGUF file or in several, read as one.

Large models are published as NAME-00001-of-00003.gguf and so on (llama.cpp's gguf-split). Only the first part has the
model's metadata; each says which of how many it is (`split.no`, counted from 0, and `split.count`), and how many
tensors all have together (`split.tensors.count`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bitfold.checkpoints.gguf.file import GgufFile, GgufTensor
from bitfold.errors import CheckpointError

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_NO_MODELS = ("mmproj", "adapter", "imatrix", "vocab")  # other things that GGUF files hold (general.type)
_LONGEST_CHAIN = 20  # links that lead to a file, at most


class GgufParts:
    """Metadata and tensors of a model, over all its files; offers what a `GgufFile` offers.

    Args:
        path: the file, or any of its parts.

    Raises:
        CheckpointError: a damaged file, a part that is missing or is that of another model.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files: list[GgufFile] = []
        try:
            self._open(GgufFile(self.path))
            self.metadata: dict[str, Any] = self.files[0].metadata
            self._owner = self._owners()
            self.tensors: dict[str, GgufTensor] = {n: file.tensors[n] for n, file in self._owner.items()}
        except BaseException:
            self.close()
            raise

    @property
    def paths(self) -> list[Path]:
        """The files, in order."""
        return [file.path for file in self.files]

    def raw(self, tensor: GgufTensor, start: int = 0, length: int | None = None) -> bytearray:
        """See `GgufFile.raw`."""
        return self._owner[tensor.name].raw(tensor, start, length)

    def view(self, tensor: GgufTensor) -> memoryview:
        """See `GgufFile.view`."""
        return self._owner[tensor.name].view(tensor)

    def place(self, tensor: GgufTensor) -> tuple[int, int]:
        """Number of its file, and where in it the tensor begins."""
        return self.files.index(self._owner[tensor.name]), tensor.start

    def data_bytes(self) -> int:
        """See `GgufFile.data_bytes`."""
        return sum(file.data_bytes() for file in self.files)

    def close(self) -> None:
        """Release the files."""
        for file in self.files:
            file.close()

    def _open(self, named: GgufFile) -> None:
        self.files = [named]
        count = _whole_number(named, "split.count", 1)
        if count <= 1:
            return
        paths = _siblings(named, count)
        if missing := [path.name for path in paths if not path.is_file()]:
            what = f"{_self_description(named, count)}, and {', '.join(missing)} {'is' if len(missing) == 1 else 'are'}"
            hint = "fetch all parts into one folder"
            raise CheckpointError(f"{what} missing", where=str(named.path), hint=hint)
        own = _whole_number(named, "split.no", 0)
        self.files = [named if i == own else GgufFile(path) for i, path in enumerate(paths)]
        for i, file in enumerate(self.files):
            _check_part(file, self.files[0], i, count)

    def _owners(self) -> dict[str, GgufFile]:
        owner: dict[str, GgufFile] = {}
        for file in self.files:
            for name in file.tensors:
                if name in owner:
                    what = f"tensor {name!r} is in {owner[name].path.name} as well: parts of different models"
                    raise CheckpointError(what, where=str(file.path), hint=_MIXED)
                owner[name] = file
        announced = self.metadata.get("split.tensors.count", len(owner))
        if len(self.files) > 1 and announced != len(owner):
            what = f"its parts hold {len(owner)} tensors, and {announced} are announced (split.tensors.count)"
            raise CheckpointError(what, where=str(self.path), hint=_MIXED)
        return owner


_MIXED = "fetch all parts again, from one place"


def _whole_number(file: GgufFile, key: str, default: int) -> int:
    value = file.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(f"metadata {key} is {value!r}, not a number", where=str(file.path), hint=_MIXED)
    return value


def _self_description(file: GgufFile, count: int) -> str:
    return f"this is part {_whole_number(file, 'split.no', 0) + 1} of {count}"


def _siblings(named: GgufFile, count: int) -> list[Path]:
    """Where all parts should be: beside the file, or beside what it is a link to."""
    for path in _chain(named.path):
        match = _PART.fullmatch(path.name)
        if match is None:
            continue
        number = _whole_number(named, "split.no", 0) + 1
        if (int(match["number"]), int(match["count"])) != (number, count):
            what = (
                f"its name says part {int(match['number'])} of {int(match['count'])}, its metadata {number} of {count}"
            )
            raise CheckpointError(what, where=str(named.path), hint=_MIXED)
        return [path.with_name(name) for name in part_names(path.name)]
    what = f"{_self_description(named, count)}, and its name does not say so: the others cannot be found"
    hint = f"name the parts NAME-00001-of-{count:05d}.gguf and so on, in one folder"
    raise CheckpointError(what, where=str(named.path), hint=hint)


def part_names(name: str) -> list[str]:
    """The names of all parts of the model that a file name says to be a part; the name alone where it says no such."""
    match = _PART.fullmatch(name)
    if match is None:
        return [name]
    stem, count = match["stem"], match["count"]
    return [f"{stem}-{i:05d}-of-{count}.gguf" for i in range(1, int(count) + 1)]


def part_paths(path: Path) -> list[Path]:
    """The file and those that go by their names with it, without opening any."""
    for link in _chain(path):
        names = part_names(link.name)
        if len(names) > 1:
            return [part for name in names if (part := link.with_name(name)).is_file()]
    return [path]


def _chain(path: Path) -> list[Path]:
    """The path, and what it is a link to, link by link."""
    chain = [path]
    while chain[-1].is_symlink() and len(chain) < _LONGEST_CHAIN:
        chain.append(chain[-1].parent / chain[-1].readlink())
    return chain


def _check_part(file: GgufFile, first: GgufFile, index: int, count: int) -> None:
    """CheckpointError for a part that says it is another, or of another model."""
    said = (_whole_number(file, "split.no", 0) + 1, _whole_number(file, "split.count", 1))
    if said != (index + 1, count):
        what = f"is named as part {index + 1} of {count}, and its metadata says {said[0]} of {said[1]}"
        raise CheckpointError(what, where=str(file.path), hint=_MIXED)
    for key in ("split.tensors.count", "general.architecture", "general.name", "general.file_type"):
        mine, theirs = file.metadata.get(key), first.metadata.get(key)
        if mine is not None and theirs is not None and mine != theirs:
            what = f"is a part of another model: {key} is {mine!r}, and {theirs!r} in {first.path.name}"
            raise CheckpointError(what, where=str(file.path), hint=_MIXED)


def model_in(folder: Path) -> Path | None:
    """The GGUF model of a folder, its first part if it has several; None where there is none.

    Projectors of images, adapters and the like beside it do not count.

    Raises:
        CheckpointError: several models.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.gguf")):
        match = _PART.fullmatch(path.name)
        found.setdefault(match["stem"] if match else path.name, path)
    models = [path for path in found.values() if _is_model(path)] if len(found) > 1 else list(found.values())
    if len(models) > 1:
        names = ", ".join(path.name for path in models[:5]) + (" ..." if len(models) > 5 else "")
        what = f"holds {len(models)} GGUF models: {names}"
        raise CheckpointError(what, where=str(folder), hint="name the file that is meant")
    return models[0] if models else None


def _is_model(path: Path) -> bool:
    file = GgufFile(path)
    try:
        metadata = file.metadata
        return metadata.get("general.type") not in _NO_MODELS and metadata.get("general.architecture") != "clip"
    finally:
        file.close()
