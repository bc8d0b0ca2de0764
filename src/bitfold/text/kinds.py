"""What a text file is, judged by how it begins: prose, JSON, a table; never by its name.

Prose may begin with a brace or a bracket, and may have a comma in every line; data is what holds together as data.
"""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass

from bitfold.errors import UsageError
from bitfold.text.shapes import CHATS, PAIRS, TEXTS

WINDOW = 1 << 20  # characters that are looked at
_LINES = 200
_HEADER = 4096  # characters; longer lines name no columns
_KNOWN = {*TEXTS, *CHATS, *(name for pair in PAIRS for name in pair)}
_OBJECT = re.compile(r'\s*\[?\s*\{\s*"(\\.|[^"\\])*"\s*:')
# A list that is cut off: of lists of objects, of texts, or of numbers (token ids), which prose has not so many of.
_NUMBERS = r"[\[\s]*-?\d[\d.eE+-]*[\]\s]*"
_LIST = re.compile(rf'\[\s*(\[\s*\{{|"(\\.|[^"\\])*"\s*,\s*"|({_NUMBERS},){{16}})')
_NUMBER = re.compile(r"-?\d+([.]\d*)?([eE][+-]?\d+)?")
_MARKUP = re.compile(r"\s*<(\?xml|!doctype\b|html\b|svg\b|rss\b|feed\b|mediawiki\b)", re.IGNORECASE)
_ELEMENT = re.compile(r"\s*<([A-Za-z][\w.-]*)[^<>]*>")
_ITEM = re.compile(r"\s*-\s+[\"']?(?P<name>[A-Za-z_]\w*)[\"']?\s*:(\s|$)")
_OUTER = re.compile(r"(---|\.\.\.|#|-(\s|$)|[\"']?[A-Za-z_][\w-]*[\"']?\s*:(\s|$))")
_IN_YAML = {*TEXTS, *CHATS, *(name for pair in PAIRS for name in pair), "role", "from", "speaker", "system"}
_DELIMITERS = ",\t;|"


@dataclass(frozen=True)
class Kind:
    """What a file is.

    Args:
        name: "prose", "json" (values one after the other, or a list of them), "yaml" or "table".
        delimiter: between the fields of a table.
    """

    name: str
    delimiter: str = ""


PROSE, JSON, YAML = Kind("prose"), Kind("json"), Kind("yaml")


def kind_of(window: str, *, whole: bool, where: str) -> Kind:
    """What a file is.

    Args:
        window: its first characters, at most WINDOW or so.
        whole: that is all of it.
        where: its name, for errors.

    Raises:
        UsageError: neither prose nor data that can be read: HTML, XML, Python's dictionaries.
    """
    begin = window.lstrip()
    markup = _MARKUP.match(begin)
    element = _ELEMENT.match(begin)
    if markup or (whole and element and begin.rstrip().endswith(f"</{element[1]}>")):
        hint = "take the text out of it first; a text as UTF-8, JSON lines, CSV or parquet is expected"
        raise UsageError("is HTML or XML, not prose", where=where, hint=hint)
    lines = [line.strip() for line in window.splitlines()[: _LINES + 1] if line.strip()]
    lines = lines if len(lines) <= 1 or whole else lines[:-1]
    if _is_json(begin, lines, whole=whole):
        return JSON
    if _is_yaml(window, whole=whole):
        return YAML
    braces = sum(line[0] == "{" and line.rstrip(",")[-1] == "}" and ":" in line for line in lines)
    if lines and 2 * braces > len(lines):
        hint = "JSON wants double quotes, true, false and null; json.dumps writes it"
        raise UsageError("its lines are dictionaries, but not in JSON", where=where, hint=hint)
    return next((Kind("table", d) for d in _DELIMITERS if _is_table(window, lines, d, whole=whole)), PROSE)


def _is_json(begin: str, lines: list[str], *, whole: bool) -> bool:
    if not begin.startswith(("{", "[")):
        return 2 * sum(_is_object(line) for line in lines) > len(lines) > 0  # a comment, or a damaged line, comes first
    if 2 * sum(_is_object(line) for line in lines) > len(lines):
        return True
    try:
        value, end = json.JSONDecoder().raw_decode(begin)
    except RecursionError:
        return True
    except ValueError:  # cut off by the window, or damaged; or prose: {like this}, [like this]
        return bool(_OBJECT.match(begin) or _LIST.match(begin))
    rest = begin[end:].lstrip()
    return not rest or (rest[0] in "{[" and isinstance(value, dict | list) and bool(_OBJECT.match(rest)))


def _is_object(line: str) -> bool:
    """Whether a line is a JSON object, or a list of more than one number: a line of prose may be [1]."""
    if line[0] not in "{[":
        return False
    try:
        value = json.loads(line)
        some = bool(value) and (isinstance(value, dict) or any(isinstance(v, str | list | dict) for v in value))
        return some or (isinstance(value, list) and len(value) > 1)
    except (ValueError, RecursionError):
        return False


def table_with(window: str, column: str, where: str) -> Kind:
    """The table of which that is a column; UsageError where the first line names no such column."""
    first = next((line for line in window.splitlines() if line.strip()), "")
    for delimiter in _DELIMITERS:
        if column in [field.strip() for field in next(csv.reader([first], delimiter=delimiter), [])]:
            return Kind("table", delimiter)
    raise UsageError(f"is prose, or its first line names no column {column!r}", where=where)


def _is_yaml(window: str, *, whole: bool) -> bool:
    """Items or keys and what is indented below them in every line, and an item or list by a name that data has."""
    lines = [line for line in window.splitlines()[: _LINES + 1] if line.strip()]
    lines = lines if len(lines) <= 1 or whole else lines[:-1]
    outer = [line for line in lines if not line[0].isspace()]
    named = any(match["name"] in _IN_YAML for line in lines if (match := _ITEM.match(line)))
    return named and len(outer) < len(lines) and all(_OUTER.match(line) for line in outer)


def _is_table(window: str, lines: list[str], delimiter: str, *, whole: bool) -> bool:
    """A header that names columns, and rows with as many fields, none of them like a clause of a sentence."""
    if not lines or len(lines[0]) > _HEADER:
        return False
    header = [field.strip() for field in next(csv.reader([lines[0]], delimiter=delimiter))]
    if header in (["text"], ["content"], ["messages"]):  # a single column
        return delimiter == "," and len(lines) > 1
    if len(header) < 2 or any(f" {field}" in lines[0].split(delimiter) for field in header):
        return False
    if len(set(header)) < len(header) and not any(_NUMBER.fullmatch(field) for field in header):
        return False  # names do not repeat; numbers do, in a table whose first line is a row as all others
    if any(len(field) > 40 or field.count(" ") > 3 or field.endswith((".", "!", "?", ",")) for field in header):
        return False
    if _KNOWN & {field.lower() for field in header}:
        return len(lines) > 1
    try:
        rows = [
            row
            for row in csv.reader(window.splitlines(keepends=True)[:_LINES], delimiter=delimiter, strict=True)
            if row
        ]
    except csv.Error:
        return False
    rows = rows if whole or len(rows) <= 2 else rows[:-1]
    return len(rows) > 2 and all(len(row) == len(header) for row in rows)
