"""Rows of data out of a file, one at a time: JSON in its many layouts, tables of fields, parquet and arrow."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bitfold.errors import UsageError
from bitfold.text.shapes import CHATS, PAIRS, TEXTS, is_known, is_message, is_texts

Named = tuple[str, Any]  # "line 3", and what is there
_NEAR = 16  # characters from the end of the buffer: an error there may be a value that is cut off
_SPEAKERS = ("system", "developer", "user", "assistant", "tool", "human", "gpt")
_FIELD = 1 << 30  # characters of a field of a table


def json_rows(pieces: Iterator[str], where: str, split: str, column: str | None = None) -> Iterator[Named]:
    """Rows of JSON lines, of values one after the other, of a list, or of an object that holds a list or columns.

    Args:
        pieces: the text of the file.
        where: its name, for errors.
        split: which list to take from an object with one for each split.
        column: the one that is wanted, whatever it is called; messages are then no rows of their own.

    Raises:
        UsageError: damaged JSON, by line.
    """
    reader, said = _Values(pieces, where), list[Any]()
    while reader.peek():
        name = f"line {reader.line}"
        if reader.peek() == "[":
            found = _list(reader, whole=column is None)
        else:
            found = ((name, row) for row in _rows_of(reader.value(), split, column))
        for row_name, row in found:
            if column is None and is_message(row) and _speaks(row):
                said.append(row)  # a conversation, a message a line
                continue
            yield row_name, row
    if said:
        yield "the conversation", said


def _speaks(row: Mapping[str, Any]) -> bool:
    return str(row.get("role", row.get("from"))).lower() in _SPEAKERS


def yaml_rows(pieces: Iterator[str], where: str, split: str, column: str | None = None) -> Iterator[Named]:
    """Rows of YAML: a list of them, an object that holds one, or documents one after the other.

    Raises:
        UsageError: damaged YAML, by line.
    """
    import yaml  # type: ignore[import-untyped]

    # Plain values: dates and numbers of a text stay as they are written.
    loader = yaml.CBaseLoader if hasattr(yaml, "CBaseLoader") else yaml.BaseLoader
    try:
        for document in yaml.load_all("".join(pieces), Loader=loader):
            for number, row in enumerate(_items(document, split, column), 1):
                yield f"item {number}", row
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "it" if mark is None else f"line {mark.line + 1}"
        what = getattr(error, "problem", None) or "damaged"
        raise UsageError(f"{line} is not YAML, unlike what is around it: {what}", where=where) from error


def _items(document: Any, split: str, column: str | None) -> list[Any]:
    if isinstance(document, list):
        whole = column is None and bool(document) and all(map(is_message, document))
        return [document] if whole else document
    return [] if document is None else list(_rows_of(document, split, column))


class _Values:
    """JSON values in a text that comes in pieces."""

    def __init__(self, pieces: Iterator[str], where: str) -> None:
        self._pieces, self._where = pieces, where
        self._text, self._at, self.line = "", 0, 1

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            rest = self._text[self._at : self._at + 4096]
            space = len(rest) - len(rest.lstrip(" \t\r\n\ufeff"))
            self._move(space)
            if space < len(rest):
                return self._text[self._at]
            if not rest and not self._more():
                return ""

    def skip(self) -> None:
        """Over a bracket or comma."""
        self._move(1)

    def value(self) -> Any:
        """The next value, whole."""
        self.peek()
        while True:
            try:
                found, end = json.JSONDecoder().raw_decode(self._text, self._at)
            except RecursionError as error:
                raise self._damaged("too deep") from error
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self._text) - _NEAR or error.msg.startswith("Unterminated")
                if not cut or not self._more():
                    raise self._damaged(error.msg, error.pos) from error
                continue
            if end == len(self._text) and self._more():
                continue  # a number might go on
            self._move(end - self._at)
            return found

    def damaged(self, what: str) -> UsageError:
        """The error to raise at this place."""
        return self._damaged(what)

    def _damaged(self, what: str, at: int | None = None) -> UsageError:
        line = self.line + self._text.count("\n", self._at, self._at if at is None else at)
        return UsageError(f"line {line} is not JSON, unlike what is around it: {what}", where=self._where)

    def _more(self) -> bool:
        """Read on: as much again as is there, so that a long value is not tried too often."""
        parts, wanted = [self._text[self._at :]], max(1, len(self._text) - self._at)
        for piece in self._pieces:
            parts.append(piece)
            wanted -= len(piece)
            if wanted <= 0:
                break
        self._text, self._at = "".join(parts), 0
        return len(parts) > 1

    def _move(self, count: int) -> None:
        self.line += self._text.count("\n", self._at, self._at + count)
        self._at += count


def _list(reader: _Values, *, whole: bool) -> Iterator[Named]:
    """The items of a list; `whole`: or the list itself where it is a conversation."""
    name, said = f"line {reader.line}", list[Any]()
    reader.skip()
    number = 0
    while reader.peek() != "]":
        number += 1
        item = reader.value()
        if whole and is_message(item):
            said.append(item)
        else:
            yield f"item {number}", item
        if reader.peek() == ",":
            reader.skip()
        elif reader.peek() != "]":
            raise reader.damaged("a comma or the end of the list is expected")
    reader.skip()
    if said:
        yield name, said


def _rows_of(value: Any, split: str, column: str | None) -> Iterable[Any]:
    """The rows of an object: itself, where it is one; columns, a list, rows by number, a list for each split."""
    if not isinstance(value, Mapping) or is_known(value) or is_message(value):
        return [value]
    columns = {key: list(v.values()) if isinstance(v, Mapping) else v for key, v in value.items()}
    columns = {key: v for key, v in columns.items() if isinstance(v, list)}
    wanted = [key for key in columns if key in (_WANTED if column is None else (column,)) and len(columns[key]) > 0]
    lengths = {len(v) for v in columns.values()}
    if wanted and (len(lengths) == 1 or is_texts(columns[wanted[0]])):
        size = len(columns[wanted[0]])
        whole = {key: v for key, v in columns.items() if len(v) == size}
        return [dict(zip(whole, row, strict=True)) for row in zip(*whole.values(), strict=True)]
    names, data = value.get("columns"), value.get("data")
    if isinstance(names, list) and isinstance(data, list) and all(isinstance(row, list) for row in data):
        return [dict(zip(names, row, strict=False)) for row in data]
    lists = {key: v for key, v in value.items() if isinstance(v, list) and v and all(map(_is_row, v))}
    if split in lists or len(lists) == 1:
        return list(lists.get(split) or next(iter(lists.values())))
    if value and all(isinstance(v, Mapping) and is_known(v) for v in value.values()):
        return list(value.values())
    return [value]


def _is_row(value: Any) -> bool:
    return not isinstance(value, str) and is_known(value)


def table_rows(pieces: Iterator[str], delimiter: str, where: str, column: str | None = None) -> Iterator[Named]:
    """Rows of a table, columns by the names in its first line; fields may hold line breaks in quotes.

    Raises:
        UsageError: a row with more or fewer fields than the header, or quotes that do not end.
    """
    before = csv.field_size_limit(_FIELD)
    try:
        reader = csv.reader(_lines(pieces), delimiter=delimiter, strict=True)
        header = [name.strip() for name in next(reader)]
        names = header if column in header else [n.lower() if n.lower() in _WANTED else n for n in header]
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                what = f"the row that ends in line {reader.line_num} has {len(row)} fields, the header {len(header)}"
                raise UsageError(what, where=where)
            yield f"the row that ends in line {reader.line_num}", dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise UsageError(f"line {reader.line_num} is no row of a table: {error}", where=where) from error
    finally:
        csv.field_size_limit(before)


def _lines(pieces: Iterator[str]) -> Iterator[str]:
    """Lines with their ends; other separators than line feeds belong to the fields."""
    left: list[str] = []
    for piece in pieces:
        first, *more = piece.split("\n")
        left.append(first)
        for line in more:
            yield "".join(left) + "\n"
            left = [line]
    if last := "".join(left):
        yield last


def arrow_rows(path: Path, begin: bytes, column: str | None = None) -> Iterator[Named]:
    """Rows of a parquet or arrow file, some at a time; only columns whose names are known, or wanted, are read.

    Raises:
        UsageError: without pyarrow, or no such column.
    """
    kind = "a parquet file" if begin.startswith(b"PAR1") else "an arrow file"
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise UsageError(
            f"is {kind}, which needs pyarrow", where=str(path), hint="pip install 'bitfold[eval]'"
        ) from error
    number, wanted = 0, {*_WANTED, column}
    try:
        if begin.startswith(b"PAR1"):
            file = parquet.ParquetFile(path)
            names = file.schema_arrow.names
            batches = file.iter_batches(batch_size=64, columns=[n for n in names if n in wanted] or None)
        else:
            opened = pyarrow.memory_map(str(path))
            reader = ipc.open_file(opened) if begin.startswith(b"ARROW1") else ipc.open_stream(opened)
            stream = begin[:4] == STREAM
            batches = reader if stream else (reader.get_batch(i) for i in range(reader.num_record_batches))
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"is {kind} that cannot be read: {first}", where=str(path)) from error


ARROW = (b"PAR1", b"ARROW1", STREAM := b"\xff\xff\xff\xff")
_WANTED = {*TEXTS, *CHATS, *(name for pair in PAIRS for name in pair), "system", "input", "tools"}
