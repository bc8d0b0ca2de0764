"""Documents to calibrate on or to be judged on: a file, or a data set of the Hub or in a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from bitfold.errors import BitfoldError, CheckpointError, HubError, UsageError

COLUMN = "text"
_HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]*){0,2}")
_LONGEST = 200  # characters of a message: the library lists every suffix it knows
_FILES = (".txt", ".md", ".jsonl", ".json", ".parquet", ".csv", ".gz", ".zip")  # what ends so is meant to be a file


def documents(spec: str | PathLike[str], *, split: str) -> Iterator[str]:
    """The documents that `spec` names, one after the other; nothing is read before the first is asked for.

    Args:
        spec: a UTF-8 text file (one document); a .jsonl file with a `text` in each line; a .parquet file, or a folder
            that the library `datasets` can read, with a column `text`; or a data set of the Hub, "org/name",
            "org/name:configuration" or "org/name:configuration:split".
        split: of a data set, where the name does not say; the only one of a data set that has no other.

    Raises:
        UsageError: no such file, or one that cannot be read as text; a data set without the extra `eval`.
        CheckpointError: a data set that cannot be read, or has no column `text`.
        HubError: a data set of the Hub that is not there, or cannot be reached.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        return _parquet(path) if path.suffix == ".parquet" else _file(path)
    if path.is_dir() and str(spec):
        return _rows(str(path), split, str(path))
    name = str(spec)
    if _HUB.fullmatch(name) and not name.startswith(".") and path.suffix not in _FILES:
        repo, configuration, own_split = [*name.split(":"), "", ""][:3]
        return _rows(name, own_split or split, repo, configuration or None)
    raise UsageError(
        "no such text file", where=name, hint="a UTF-8 text file, a .jsonl file, or a data set of the Hub: org/name"
    )


def _file(path: Path) -> Iterator[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot be read as UTF-8 text: {error}", where=str(path)) from error
    if path.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.split("\n"), 1):  # not splitlines: JSON may hold other line separators
        if line.strip():
            yield _line(line, number, path)


def _line(line: str, number: int, path: Path) -> str:
    try:
        text = json.loads(line)[COLUMN]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"line {number} has no `{COLUMN}`: {error}", where=str(path)) from error
    if not isinstance(text, str):
        raise UsageError(f"the `{COLUMN}` of line {number} is no text", where=str(path))
    return text


def _parquet(path: Path) -> Iterator[str]:
    return _rows(str(path), "train", "parquet", data_files=str(path))


def _rows(where: str, split: str, *arguments: Any, **options: Any) -> Iterator[str]:
    """The column `text` of a data set, read as it comes: a large one is never fetched whole."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        is_local = Path(where).exists()
        what = "needs the library `datasets`" if is_local else "is no file, and data sets of the Hub need an extra"
        raise UsageError(what, where=where, hint="pip install 'bitfold[eval]'") from error
    try:
        for row in _split(load_dataset(*arguments, **options, streaming=True), split, where):
            if not isinstance(text := row.get(COLUMN), str):
                columns = ", ".join(map(str, row))
                raise CheckpointError(f"the data set has no text in a column `{COLUMN}`; it has {columns}", where=where)
            yield text
    except BitfoldError:
        raise
    except Exception as error:  # whatever the network, the Hub and the data set's own format come up with
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:_LONGEST]
        if Path(where).exists():
            raise CheckpointError(f"the data set cannot be read: {first}", where=where) from error
        hint = "is it a file? then check the path"
        raise HubError(f"the data set cannot be read: {first}", where=where, hint=hint) from error


def _split(splits: Any, wanted: str, where: str) -> Any:
    """The split of that name, or the only one there is."""
    if wanted in splits:
        return splits[wanted]
    if len(splits) == 1:
        return next(iter(splits.values()))
    hint = f"{where.split(':')[0]}:CONFIGURATION:SPLIT, where SPLIT is {' or '.join(splits)}"
    raise UsageError(f"the data set has no split {wanted!r}", where=where, hint=hint)
