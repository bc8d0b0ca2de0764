"""JSON from strangers: read without trust.

A file is compared with a limit before it is read, a key that appears twice is refused (readers differ in which of the
two they believe), and whatever is wrong is one CheckpointError.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bitfold.errors import CheckpointError

LARGEST = 100_000_000  # bytes of a JSON text, the limit that safetensors sets to its headers


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: unreadable, too large, not UTF-8, not JSON, not an object, a key twice, nested too deeply.
    """
    try:
        size = file.stat().st_size
        if size > LARGEST:
            raise CheckpointError(f"has {size} bytes, too many for a JSON file of a checkpoint", where=str(file))
        return parse_json_object(file.read_bytes(), str(file))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(file)) from error


def parse_json_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in these bytes; see `read_json_object`."""
    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not readable JSON: {error}", where=where) from error
    if not isinstance(found, dict):
        raise CheckpointError("is not a JSON object", where=where)
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return found


def shape_of(value: Any) -> tuple[int, ...]:
    """A shape as JSON has it; ValueError unless it is a short list of sizes whose product fits 63 bits."""
    if not isinstance(value, list) or len(value) > 8:
        raise ValueError(f"{str(value)[:60]} is not a shape")
    total = 1
    for size in value:
        if type(size) is not int or not 0 <= size < 1 << 62:
            raise ValueError(f"{str(size)[:60]} is not a size")
        total *= max(size, 1)
    if total >= 1 << 62:
        raise ValueError(f"the shape {value} has more elements than any memory")
    return tuple(value)
