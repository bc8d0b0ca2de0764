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
        found = self._sayable(conversation, where, name)
        return None if found is None else found[1]

    def answers(self, conversation: Conversation, where: str, name: str) -> tuple[str, list[tuple[int, int]]]:
        """The text, and from where to where in it the assistant speaks, with what ends its turn.

        Raises:
            UsageError: see `__call__`; or the template writes a turn otherwise when others follow it.
        """
        found = self._sayable(conversation, where, name)
        if found is None:
            whole, said = conversation.plain or "", str(conversation.messages[-1]["content"])
            return whole, [(len(whole) - len(said), len(whole))]
        messages, whole = found
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                asked, said = (
                    self._written(messages[:n], conversation.tools, ask=n == i).removeprefix(self._start)
                    for n in (i, i + 1)
                )
                if not (said.startswith(asked) and whole.startswith(said)):
                    what = f"the chat template writes a turn of {name} otherwise when others follow, so that answers"
                    raise UsageError(f"{what} cannot be told from the rest", where=where)
                spans.append((len(asked), len(said)))
        return whole, spans

    def _sayable(self, conversation: Conversation, where: str, name: str) -> tuple[list[dict[str, Any]], str] | None:
        """The messages as the template takes them, and the text; None where it reads without a template."""
        if not getattr(self._tokenizer, "chat_template", None):
            if conversation.plain is not None:
                return None
            what = f"{name} holds chat messages (`messages` or `conversations`), and the tokenizer has no chat template"
            raise UsageError(what, where=where, hint="give plain text, or a column `text`")
        messages = list(conversation.messages)
        try:
            return messages, self._written(messages, conversation.tools).removeprefix(self._start)
        except UsageError as error:
            if messages[0]["role"] != "system" or len(messages) < 2:
                raise UsageError(f"{error.what} {name}", where=where) from error
            first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
            try:  # templates such as Gemma's know no system
                messages = [first, *messages[2:]]
                return messages, self._written(messages, conversation.tools).removeprefix(self._start)
            except UsageError:
                raise UsageError(f"{error.what} {name}", where=where) from error

    def _written(self, messages: list[dict[str, Any]], tools: tuple[Any, ...], *, ask: bool = False) -> str:
        sound = [{**m, "content": sound_text(m["content"])} for m in messages]
        try:
            options = {"tokenize": False, "add_generation_prompt": ask}
            return str(self._tokenizer.apply_chat_template(sound, tools=list(tools) or None, **options))
        except Exception as error:  # a template is a program, and raises what it likes
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UsageError(f"the chat template refuses ({first})") from error
