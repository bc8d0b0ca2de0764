"""Conversations written out by the chat template of a tokenizer."""

from __future__ import annotations

from typing import Any

from bitfold.errors import UsageError
from bitfold.text.shapes import Conversation
from bitfold.text.stream import sound_text


class Renderer:
    """Writes conversations out.

    Args:
        tokenizer: of transformers.
        start: the tokens that begin a text, as it writes them: windows put them, not each conversation.
    """

    def __init__(self, tokenizer: Any, start: str) -> None:
        self._tokenizer, self._start = tokenizer, start

    def __call__(self, conversation: Conversation, where: str, name: str) -> str | None:
        """The text; None where there is no template and the conversation reads without one.

        Raises:
            UsageError: no template, or one that refuses the conversation.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            if conversation.plain is not None:
                return None
            what = f"{name} holds chat messages (`messages` or `conversations`), and the tokenizer has no chat template"
            raise UsageError(what, where=where, hint="give plain text, or a column `text`")
        messages = list(conversation.messages)
        try:
            written = self._written(messages, conversation.tools)
        except UsageError as error:
            if messages[0]["role"] != "system" or len(messages) < 2:
                raise UsageError(f"{error.what} {name}", where=where) from error
            first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
            try:  # templates such as Gemma's know no system
                written = self._written([first, *messages[2:]], conversation.tools)
            except UsageError:
                raise UsageError(f"{error.what} {name}", where=where) from error
        return written.removeprefix(self._start)

    def _written(self, messages: list[dict[str, Any]], tools: tuple[Any, ...]) -> str:
        sound = [{**m, "content": sound_text(m["content"])} for m in messages]
        try:
            return str(self._tokenizer.apply_chat_template(sound, tools=list(tools) or None, tokenize=False))
        except Exception as error:  # a template is a program, and raises what it likes
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UsageError(f"the chat template refuses ({first})") from error
