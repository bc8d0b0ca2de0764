"""Which files of a folder hold its weights: those that transformers would take, where several could be meant."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from bitfold.checkpoints.headers import read_header
from bitfold.checkpoints.side_files import PICKLES
from bitfold.checkpoints.untrusted import read_json_object
from bitfold.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<rest>.*)\.safetensors")
# Files that are not a second set of the model's weights: adapters, and what trainers leave.
_NO_RIVALS = re.compile(r"adapter_.*|training_args.*|optimizer.*|scheduler.*|rng_state.*|scaler.*")


def locate(folder: Path, config: Mapping[str, Any]) -> dict[str, Path]:
    """Which file of a folder holds which tensor.

    The order is that of transformers: what the config names (`transformers_weights`), model.safetensors, its index.
    Where there is none of them, all safetensors files at the root, if they are one set of weights.

    Raises:
        CheckpointError: no weights, only pickled ones, only an adapter, several sets, a shard that is missing.
    """
    named = config.get("transformers_weights")
    if isinstance(named, str):
        _check_file_name(named, folder / "config.json", (".safetensors", ".safetensors.index.json"))
        found = folder / named
        return _read_index(found) if named.endswith(".json") else _tensors([found])
    if (folder / SINGLE).is_file():
        return _tensors([folder / SINGLE])
    if (folder / INDEX).is_file():
        return _read_index(folder / INDEX)
    return _tensors(_one_set(folder))


def say_what_is_left(folder: Path, taken: list[Path], unread: list[str]) -> None:
    """Warn, in one line, of files that could be the model's weights as well and are not read."""
    rivals = [name for name in unread if not _NO_RIVALS.fullmatch(name)]
    if rivals:
        more = f" and {len(rivals) - 3} more" if len(rivals) > 3 else ""
        ours = taken[0].name if len(taken) == 1 else f"{taken[0].name} and {len(taken) - 1} more"
        text = f"{folder}: the weights are those of {ours}, as transformers would take them; not read:"
        warnings.warn(f"{text} {', '.join(rivals[:3])}{more}", stacklevel=2)


def _tensors(files: list[Path]) -> dict[str, Path]:
    where: dict[str, Path] = {}
    for file in files:
        for name in read_header(file):
            if name in where:
                raise CheckpointError(f"tensor {name} is in {where[name].name} as well", where=str(file))
            where[name] = file
    return where


def _one_set(folder: Path) -> list[Path]:
    """The safetensors files of a folder that has neither model.safetensors nor an index."""
    files = sorted(folder.glob("*.safetensors"))
    own = [f for f in files if not f.name.startswith(("adapter_", "consolidated"))]
    if not own:
        what, hint = _none(folder, files)
        raise CheckpointError(what, where=str(folder), hint=hint)
    sets: dict[tuple[str, str], list[Path]] = {}
    for file in own:
        match = _SHARD.fullmatch(file.name)
        sets.setdefault((match["count"], match["stem"] + match["rest"]) if match else ("", ""), []).append(file)
    if len(sets) > 1:
        names = ", ".join(group[0].name for group in sets.values())
        raise CheckpointError(f"holds several sets of weights ({names})", where=str(folder), hint="keep one of them")
    ((count, _), group), *_ = sets.items()
    if count and len(group) < int(count):
        missing = f"{len(group)} of {int(count)} shards are there, and no index"
        raise CheckpointError(missing, where=str(folder), hint="download the rest, and the index")
    return group


def _none(folder: Path, files: list[Path]) -> tuple[str, str | None]:
    """What to say of a folder without weights of its own, and what to do about it."""
    if any(f.name.startswith("adapter_") for f in files) or (folder / "adapter_config.json").is_file():
        return "holds an adapter, not a model", "merge it into its base model first (merge_and_unload of PEFT)"
    if files:
        return f"holds only {files[0].name}, in the names of another library", "take the files named model*.safetensors"
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
    if pickles:
        hint = "save the model with safetensors (model.save_pretrained does) or take a revision that has them"
        return f"holds only pickled weights ({pickles[0]}), which can run code when read", hint
    return "holds no .safetensors files", None


def _read_index(index: Path) -> dict[str, Path]:
    """Which file of the folder holds which tensor, by the index; what the files hold beyond it counts as well."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError("is not a safetensors index: it has no weight_map", where=str(index))
    files = list(dict.fromkeys(weight_map.values()))
    if not files:
        raise CheckpointError("names no file of weights: its weight_map is empty", where=str(index))
    for file in files:
        _check_file_name(file, index, (".safetensors",))
    where = {name: index.parent / file for name, file in weight_map.items()}
    for file in files:
        for name in read_header(index.parent / file):
            if where.setdefault(name, index.parent / file).name != file:
                raise CheckpointError(f"tensor {name} is in {where[name].name} as well", where=str(index.parent / file))
    return where


def _check_file_name(file: str, index: Path, suffixes: tuple[str, ...]) -> None:
    inside = PurePosixPath(file).name == PureWindowsPath(file).name == file and "\0" not in file
    if not inside or not file.endswith(suffixes):
        raise CheckpointError(f"names the file {file!r}, which is not in this folder", where=str(index))
    try:
        found = (index.parent / file).is_file()
    except (OSError, ValueError):  # a name that no file system takes
        found = False
    if not found:
        raise CheckpointError(f"the shard {file!r} is missing", where=str(index.parent), hint="download it again")
