"""Whether a folder is a whole checkpoint: what is uploaded, and what an earlier download left."""

from __future__ import annotations

import json
from pathlib import Path

from bitfold.checkpoints.weight_files import INDEX, SINGLE
from bitfold.errors import CheckpointError


def require_complete(folder: Path, *, where: str | None = None) -> None:
    """Raise CheckpointError unless the folder is a checkpoint with nothing missing.

    config.json must be readable; every shard of the index must be there, hold the tensors that the index says, and be
    as long as its own header says.
    """
    where = where or str(folder)
    if not folder.is_dir():
        raise CheckpointError("not a folder", where=where)
    if not (folder / "config.json").is_file():
        raise CheckpointError("no config.json: not a model folder", where=where)
    read_json(folder / "config.json")
    shards: dict[str, set[str]] = {f.name: set() for f in folder.glob("*.safetensors")}
    if (folder / SINGLE).is_file():
        shards = {SINGLE: set()}
    elif (folder / INDEX).is_file():
        shards = {}
        for tensor, shard in read_json(folder / INDEX)["weight_map"].items():
            shards.setdefault(shard, set()).add(tensor)
    if not shards:
        raise CheckpointError("no safetensors weights", where=where)
    for shard, tensors in shards.items():
        if lost := tensors - _tensor_names(folder / shard):
            raise CheckpointError(f"tensor {min(lost)} is in the index but not in the file", where=f"{where}/{shard}")


def _tensor_names(shard: Path) -> set[str]:
    """Names of the tensors of a safetensors file, whose length is checked against its header."""
    if not shard.is_file():
        raise CheckpointError("the index names this file, and it is missing", where=str(shard))
    with shard.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        raw = file.read(size) if 8 + size <= shard.stat().st_size else b""
    try:
        header = json.loads(raw)
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("truncated or not a safetensors file", where=str(shard)) from error
    if shard.stat().st_size != 8 + size + end:
        raise CheckpointError(f"truncated: {8 + size + end} bytes expected", where=str(shard), hint="write it again")
    return set(header) - {"__metadata__"}


def read_json(path: Path) -> dict[str, dict[str, str]]:
    """A config or an index of a checkpoint; CheckpointError where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"not readable JSON: {error}", where=str(path)) from error
    if not isinstance(value, dict) or (path.name == INDEX and not isinstance(value.get("weight_map"), dict)):
        raise CheckpointError("not the JSON object it should be", where=str(path))
    return value
