"""Text to calibrate on or to be judged on, in pieces: out of a file, or a data set of the Hub or in a folder.

What a file is, is judged by what is in it (see `kinds`): prose is read as it is; of data, the column of text or the
conversations (see `shapes`). A text is read only as far as it is needed.
"""

from __future__ import annotations

import itertools
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from bitfold.errors import BitfoldError, CheckpointError, HubError, UsageError
from bitfold.text.encodings import characters, first_bytes
from bitfold.text.kinds import JSON, PROSE, WINDOW, YAML, kind_of, table_with
from bitfold.text.mixes import OWN, parts_of
from bitfold.text.rows import ARROW, Named, arrow_rows, json_rows, table_rows, yaml_rows
from bitfold.text.shapes import Conversation, document

BETWEEN = "\n\n"  # documents; conversations follow one another as their template ends them
_HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]*){0,2}")
_URL = re.compile(r"[a-z][a-z0-9+]*://", re.IGNORECASE)
_LONGEST = 200  # characters of a message: the library lists every suffix it knows
_FILES = (
    ".txt",
    ".md",
    ".jsonl",
    ".json",
    ".parquet",
    ".csv",
    ".tsv",
    ".gz",
    ".zip",
)  # what ends so is meant as a file
Render = Callable[[Conversation, str, str], str | None]
"""Writes a conversation out, given the file and the name of the row for errors; None where there is no template."""


def text_pieces(spec: str | PathLike[str], *, split: str, render: Render) -> Iterator[str]:
    """The text that `spec` names, in pieces; nothing is read before the first is asked for.

    Args:
        spec: a file: prose in UTF-8 (or with a byte order mark), JSON, JSON lines, CSV, TSV, parquet or arrow, perhaps
            compressed by gzip, bzip2 or xz; a folder that the library `datasets` can read; a data set of the Hub,
            "org/name", "org/name:configuration" or "org/name:configuration:split"; or the text itself, where it has a
            line break or is longer than a path. A column of data may be named behind a "#": "rows.csv#story".
        split: of a data set, where the name does not say; the only one of a data set that has no other.
        render: writes conversations out.

    Raises:
        UsageError: no such file, or one that is neither text nor data whose columns are known; a data set without the
            extra `eval`.
        CheckpointError: a data set that cannot be read.
        HubError: a data set of the Hub that is not there, or cannot be reached.
    """
    if is_text(spec):
        return iter([str(spec)])
    spec, column = split_column(spec)
    path, name = Path(spec).expanduser(), str(spec)
    kind = _kind(path)
    if kind is not None and stat.S_ISREG(kind):
        return _file(path, split, render, column)
    if kind is not None and stat.S_ISDIR(kind) and name:
        return _joined(_rows(str(path), split, str(path)), str(path), render, column)
    if kind is not None and name:
        raise UsageError("is no ordinary file", where=name, hint="write it to a file first")
    if _URL.match(name):
        hint = "download it first, or name a data set of the Hub: org/name"
        raise UsageError("is an address, and texts are read from files", where=name, hint=hint)
    if _HUB.fullmatch(name) and not name.startswith(".") and path.suffix not in _FILES:
        repo, configuration, own_split = [*name.split(":"), "", ""][:3]
        return _joined(_rows(name, own_split or split, repo, configuration or None), name, render, column)
    own = f"bitfold's own are {', '.join(OWN)}"
    hint = f"a text in UTF-8, JSON lines, CSV or parquet, or a data set of the Hub: org/name; {own}"
    raise UsageError("no such text file", where=name, hint=hint)


def split_column(spec: str | PathLike[str]) -> tuple[str | PathLike[str], str | None]:
    """What names a text, and the column of it that is meant, where one is named: FILE#COLUMN."""
    name, _, column = str(spec).rpartition("#")
    if is_text(spec) or not name or not column or _kind(Path(spec).expanduser()) is not None:
        return spec, None
    return name, column


def with_column(spec: str | None, column: str | None) -> str | None:
    """What names a text and a column of it; UsageError where the text has no columns."""
    if column is None:
        return spec
    if spec is not None and len(parts_of(spec)) > 1:
        raise UsageError("of which text?", where=f"--text-column {column}", hint="name it there: rows.csv#story:0.5")
    if spec is None or spec in (*OWN, "self") or is_text(spec):
        hint = "name the file or data set that has it"
        raise UsageError("a column of what?", where=f"--text-column {column}", hint=hint)
    return f"{spec}#{column}"


def is_text(spec: str | PathLike[str] | None) -> bool:
    """Whether this is a text and not the name of one."""
    return isinstance(spec, str) and ("\n" in spec or len(spec) > 1000)


def _kind(path: Path) -> int | None:
    """What the path names; None for nothing."""
    try:
        return path.stat().st_mode
    except PermissionError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (OSError, ValueError):  # not there; no name that a file could have
        return None


def _file(path: Path, split: str, render: Render, column: str | None) -> Iterator[str]:
    begin = first_bytes(path)
    if begin.startswith(ARROW):
        yield from _joined(arrow_rows(path, begin, column), str(path), render, column)
        return
    blocks = characters(path)
    window = ""
    for block in blocks:
        window += block
        if len(window) >= WINDOW:
            break
    rest = next(blocks, None)
    kind = kind_of(window, whole=rest is None, where=str(path))
    if column is not None and kind is PROSE:
        kind = table_with(window, column, str(path))
    pieces = itertools.chain([window], [] if rest is None else [rest], blocks)
    if kind is PROSE:
        yield from pieces
    elif kind is JSON:
        yield from _joined(json_rows(pieces, str(path), split, column), str(path), render, column)
    elif kind is YAML:
        yield from _joined(yaml_rows(pieces, str(path), split, column), str(path), render, column)
    else:
        yield from _joined(table_rows(pieces, kind.delimiter, str(path), column), str(path), render, column)


def _joined(rows: Iterable[Named], where: str, render: Render, column: str | None) -> Iterator[str]:
    """Documents with an empty line between them, conversations one after the other."""
    between = ""
    for name, row in rows:
        found = document(row, where, name, column)
        if found is None:
            continue
        written = render(found, where, name) if isinstance(found, Conversation) else None
        if written is not None:
            yield (BETWEEN if between else "") + written
            between = ""
        else:
            text = found.plain or "" if isinstance(found, Conversation) else found
            yield between + text
            between = BETWEEN


def _rows(where: str, split: str, *arguments: Any, **options: Any) -> Iterator[Named]:
    """Rows of a data set, read as they come: a large one is never fetched whole."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        is_local = Path(where).exists()
        what = "needs the library `datasets`" if is_local else "is no file, and data sets of the Hub need an extra"
        raise UsageError(what, where=where, hint="pip install 'bitfold[eval]'") from error
    try:
        for number, row in enumerate(_split(load_dataset(*arguments, **options, streaming=True), split, where), 1):
            yield f"row {number}", row
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
