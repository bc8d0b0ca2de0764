"""Tokens -> text, piece by piece: whole characters only, and never a part of what ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BEHIND = 8  # tokens that are decoded again with the new ones: what they are may depend on those before
_LONG = 32  # tokens after which those in front are let go


class TextStream:
    """Text of the tokens so far, as it becomes certain.

    A token may be a part of a character, and some tokenizers strip the space in front of a first word: so some tokens
    before the new ones are decoded with them. Text that could be the beginning of a stop text waits until it is not.

    Args:
        tokenizer: of transformers; special tokens give no text.
        stops: texts that end it, and are not part of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        self._decoded = 0  # characters of the text of `_ids` that are certain
        self._held = ""  # certain, but it could begin a stop text
        self.stopped = False
        self.text = ""  # all that was given out

    def add(self, token: int) -> str:
        """A token; the text that is certain by it. Nothing more comes once `stopped`."""
        self._ids.append(token)
        text = self._decode()
        return self._give(text, len(text) - len(text.rstrip("\ufffd")), final=False)

    def finish(self) -> str:
        """There are no more tokens: what is left of the text."""
        return self._give(self._decode(), 0, final=True)

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _give(self, text: str, unsure: int, *, final: bool) -> str:
        if self.stopped:
            return ""
        sure = len(text) - unsure
        fresh = self._held + text[self._decoded : sure]
        self._decoded = max(self._decoded, sure)
        if not unsure and len(self._ids) > _LONG:
            self._ids = self._ids[-_BEHIND:]
            self._decoded = len(self._decode())
        given, self._held = self._until_stop(fresh, final)
        self.text += given
        return given

    def _until_stop(self, text: str, final: bool) -> tuple[str, str]:
        """What may be given out, and what must wait."""
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)], ""
        if final:
            return text, ""
        waiting = max((_overlap(text, stop) for stop in self._stops), default=0)
        return text[: len(text) - waiting], text[len(text) - waiting :]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that the stop text begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
