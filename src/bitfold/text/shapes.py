"""One row of data -> a document: which of its columns hold the text, or the conversation.

Known are the shapes that data sets for language models come in: a column of text; chat messages (`messages` of role and
content, ShareGPT's `conversations` of from and value); pairs of prompt and answer. Everything else is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bitfold.errors import UsageError

TEXTS = ("text", "content", "document", "article", "body", "passage", "raw_content", "page_content", "code", "story")
CHATS = ("messages", "conversations", "conversation", "chat", "dialog", "dialogue", "turns", "chosen")
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "chosen"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("problem", "solution"),
    ("input", "output"),
)
_ROLES, _SAID = ("role", "from", "speaker"), ("content", "value", "text")
_SPEAKERS = {
    "human": "user",
    "prompter": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "function": "tool",
}
EXPECTED = (
    f"one of {', '.join(TEXTS[:3])} ...; or {', '.join(CHATS[:2])}; or two such as {' and '.join(PAIRS[0])},"
    f" {' and '.join(PAIRS[3])}; rename a column"
)
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages of role and content, to be written out by a chat template.

    Args:
        messages: each with `role` and `content`.
        plain: how it reads where there is no template; None: only as a conversation.
        tools: that could be called, as JSON schemas.
    """

    messages: tuple[dict[str, Any], ...]
    plain: str | None = None
    tools: tuple[Any, ...] = ()


Document = str | Conversation


def is_known(row: Any) -> bool:
    """Whether a document can be made of it."""
    if not isinstance(row, Mapping):
        return isinstance(row, str) or is_messages(row)
    return _chat_column(row) is not None or _text_column(row) is not None or _pair(row) is not None


def is_message(row: Any) -> bool:
    """Whether it says who speaks and what."""
    if not isinstance(row, Mapping):
        return False
    return any(isinstance(row.get(key), str) for key in _ROLES) and any(key in row for key in _SAID)


def is_messages(value: Any) -> bool:
    """Whether it is a conversation: a list of messages."""
    return isinstance(value, Sequence) and bool(value) and all(is_message(message) for message in value)


def document(row: Any, where: str, name: str, column: str | None = None) -> Document | None:
    """The document of a row; None for one that is empty.

    Args:
        row: a text, a conversation, or columns by name.
        where, name: of the file, and of the row in it, for errors.
        column: which holds the text, or the conversation; None: found by its name.

    Raises:
        UsageError: no shape that is known, or no such column; the message names the columns.
    """
    if column is not None:
        return _of_column(row, column, where, name)
    if isinstance(row, str):
        return row
    if is_messages(row):
        return conversation(row)
    if not isinstance(row, Mapping):
        found = f"is {_kind(row)}"
        raise UsageError(
            f"{name} {found}, neither a text nor columns by name", where=where, hint=f"expected: {EXPECTED}"
        )
    if (chat := _chat_column(row)) is not None:
        made = replace(conversation(_messages(row[chat])), tools=_tools(row))
        if isinstance(row.get("system"), str) and row["system"] and made.messages[0]["role"] != "system":
            return replace(made, messages=({"role": "system", "content": row["system"]}, *made.messages))
        return made
    if (column := _text_column(row)) is not None:
        return row[column] or None
    if (pair := _pair(row)) is not None:
        return _asked(row, *pair)
    columns = ", ".join(f"`{key}`" for key in list(row)[:12]) or "none"
    empty = [key for key in (*TEXTS, *CHATS) if key in row and row[key] in (None, "", [])]
    if empty:
        return None
    raise UsageError(f"{name} has no text that is known by its name; its columns: {columns}", where=where,
                     hint=f"expected: {EXPECTED}")  # fmt: skip


def _of_column(row: Any, column: str, where: str, name: str) -> Document | None:
    if not isinstance(row, Mapping) or column not in row:
        columns = ", ".join(f"`{key}`" for key in list(row)[:12]) if isinstance(row, Mapping) else "none"
        raise UsageError(f"{name} has no column `{column}`; its columns: {columns}", where=where)
    value = row[column]
    if value is None or value == "" or value == []:
        return None
    if isinstance(value, Sequence) and not isinstance(value, str) and is_texts(value) and column not in CHATS:
        return "\n".join(value)
    if messages := _messages(value):
        return replace(conversation(messages), tools=_tools(row))
    if not isinstance(value, str):
        raise UsageError(f"{name} has {_kind(value)} in the column `{column}`, not a text", where=where)
    return value


def conversation(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """With roles and keys as chat templates want them."""
    return Conversation(tuple(_message(message) for message in messages))


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    role = str(next(message[key] for key in _ROLES if isinstance(message.get(key), str)))
    said = next((message[key] for key in _SAID if key in message), None)
    if isinstance(said, Sequence) and not isinstance(said, str):  # parts of text and pictures
        parts = [
            part if isinstance(part, str) else part.get("text") for part in said if isinstance(part, str | Mapping)
        ]
        said = "\n".join(part for part in parts if part)
    rest = {key: value for key, value in message.items() if key not in (*_ROLES, *_SAID) and value is not None}
    rest |= {"tool_calls": _called(rest["tool_calls"])} if "tool_calls" in rest else {}
    return {**rest, "role": _SPEAKERS.get(role.lower(), role), "content": "" if said is None else str(said)}


def _tools(row: Row) -> tuple[Any, ...]:
    """What could be called: a list, or JSON of one."""
    found = _decoded(row.get("tools"))
    return tuple(found) if isinstance(found, list) and all(isinstance(tool, Mapping) for tool in found) else ()


def _called(calls: Any) -> Any:
    """Calls of tools with their arguments as objects, as chat templates want them; OpenAI's API has JSON there."""
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        return calls
    return [_call(call) if isinstance(call, Mapping) else call for call in calls]


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    inner = call.get("function")
    found = {key: value for key, value in call.items() if value is not None}
    if isinstance(inner, Mapping):
        return {**found, "function": _call(inner)}
    arguments = _decoded(call.get("arguments"))
    return {**found, "arguments": arguments} if isinstance(arguments, Mapping) else found


def _decoded(value: Any) -> Any:
    """What JSON says; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _chat_column(row: Row) -> str | None:
    return next((key for key in CHATS if _messages(row.get(key))), None)


def _messages(value: Any) -> list[Mapping[str, Any]]:
    """The messages of a column: a list of them, a list for each key, or JSON; [] where it holds none."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    if isinstance(value, Mapping):
        lists = {key: value[key] for key in (*_ROLES, *_SAID) if isinstance(value.get(key), Sequence)}
        value = [dict(zip(lists, parts, strict=False)) for parts in zip(*lists.values(), strict=False)]
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 1 and is_texts(value):
        return [{"role": ("user", "assistant")[i % 2], "content": said} for i, said in enumerate(value)]
    return list(value) if is_messages(value) and not isinstance(value, str) else []


def is_texts(value: Sequence[Any]) -> bool:
    """Whether these are texts, all of them."""
    return all(isinstance(item, str) for item in value)


def _text_column(row: Row) -> str | None:
    return next((key for key in TEXTS if isinstance(row.get(key), str)), None)


def _pair(row: Row) -> tuple[str, str] | None:
    """Prompt and answer: two texts, or two lists of messages."""
    for prompt, answer in PAIRS:
        both = [row.get(prompt), row.get(answer)]
        if all(isinstance(part, str) for part in both) or all(is_messages(part) for part in both):
            return prompt, answer
    return None


def _asked(row: Row, prompt: str, answer: str) -> Document | None:
    if not isinstance(row[prompt], str):
        return conversation([*row[prompt], *row[answer]])
    more = row.get("input") if prompt == "instruction" else None
    asked = row[prompt] + (f"\n\n{more}" if isinstance(more, str) and more else "")
    said = row[answer]
    if not asked + said:
        return None
    between = "" if said[:1].isspace() or asked[-1:].isspace() else "\n"
    system = (
        [{"role": "system", "content": row["system"]}] if isinstance(row.get("system"), str) and row["system"] else []
    )
    turns = [*system, {"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return Conversation(tuple(turns), asked + between + said)


def _kind(value: Any) -> str:
    names = {list: "a list", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")
