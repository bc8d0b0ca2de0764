"""From a request to the texts that it asks for: tokens, sampler, stream."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from bitfold.engine.grammar import Guide
from bitfold.engine.loop import end_tokens, stop_texts
from bitfold.engine.sampling import Sampler, Sampling
from bitfold.engine.stream import TextStream
from bitfold.serving.errors import ApiError
from bitfold.serving.job import Asked, Job, Receiver
from bitfold.serving.requests import ChatRequest, CompletionRequest
from bitfold.text.start import text_start

_RESERVED = frozenset(
    {"messages", "conversation", "tools", "tokenize", "return_dict", "return_tensors", "chat_template"}
)
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Preparer:
    """Knows the model's tokens; used by one thread, beside that of the scheduler.

    Args:
        tokenizer: of transformers.
        generation_config: the model's.
        context: tokens of a text, prompt included.
        vocabulary: tokens that the model knows.
    """

    def __init__(self, tokenizer: Any, generation_config: Any, context: int, vocabulary: int) -> None:
        # One of these encodes while the other, in the thread of the scheduler, decodes: they cannot be used at once.
        self._tokenizer, self._decoding = copy.deepcopy(tokenizer), tokenizer
        self._config, self._context, self._vocabulary = generation_config, context, vocabulary
        self._ends, self._start = end_tokens(generation_config), text_start(tokenizer)
        self._guide: Guide | None = None

    def chat(self, request: ChatRequest, send: Receiver) -> Job:
        """The answer to a conversation.

        Raises:
            ApiError, UsageError: what is wrong with it.
        """
        ids = self._conversation(request)
        return self._job(request, ids, request.wanted_tokens, send)

    def completions(self, request: CompletionRequest, sends: Sequence[Receiver]) -> list[Job]:
        """What follows each of the prompts; errors as `chat`. There are as many `sends` as prompts."""
        found = []
        for prompt, send in zip(request.prompts, sends, strict=True):
            if isinstance(prompt, str):
                ids = [*self._start, *self._tokenizer(prompt, add_special_tokens=False)["input_ids"]]
            else:
                ids = prompt
            if not ids:
                raise ApiError(400, "the prompt is empty", param="prompt", code="invalid_value")
            found.append(self._job(request, ids, request.wanted_tokens, send))
        return found

    def _conversation(self, request: ChatRequest) -> list[int]:
        if not getattr(self._tokenizer, "chat_template", None):
            raise ApiError(400, "the model has no chat template: use /v1/completions", code="no_chat_template")
        more = request.chat_template_kwargs or {}
        if wrong := sorted(_RESERVED & set(more)):
            raise ApiError(400, f"{wrong[0]} is not for the template", param="chat_template_kwargs")
        tools = None if request.tool_choice == "none" else request.tools
        try:
            found = self._tokenizer.apply_chat_template(
                [message.to_dict() for message in request.messages],
                tools=tools or None,
                tokenize=True,
                return_dict=True,
                **{"add_generation_prompt": True, **more},
            )
        except Exception as error:  # a template is a program: it refuses conversations in its own words
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ApiError(400, f"the model's chat template: {first}", param="messages") from error
        return list(found["input_ids"])

    def _job(
        self, request: ChatRequest | CompletionRequest, ids: Sequence[int], wanted: int | None, send: Receiver
    ) -> Job:
        if (last := max(ids)) >= self._vocabulary or min(ids) < 0:
            raise ApiError(400, f"there is no token {last if min(ids) >= 0 else min(ids)}", param="prompt")
        room = self._context - len(ids)
        if room < 1:
            message = f"This model's maximum context length is {self._context} tokens, but the prompt has {len(ids)}."
            param = "messages" if isinstance(request, ChatRequest) else "prompt"
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        limit = room if wanted is None else min(room, wanted)
        sampling = request.sampling(limit)
        if any(token >= self._vocabulary for token in sampling.logit_bias):
            raise ApiError(400, "there is no such token", param="logit_bias", code="invalid_value")
        stream = TextStream(self._decoding, (*sampling.stop, *stop_texts(self._config)))
        return Job(Asked(ids, limit, self._ends, request.chances), self._sampler(ids, sampling), stream, send)

    def _sampler(self, ids: Sequence[int], sampling: Sampling) -> Sampler:
        matcher = None
        if sampling.grammar is not None:
            self._guide = self._guide or Guide(self._tokenizer, sorted(self._ends))
            matcher = self._guide.matcher(sampling.grammar)
        return Sampler(sampling.filled(self._config), ids, matcher)


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """What a token is in a text, which may be a part of a character."""
    text = str(tokenizer.decode([token]))
    name = tokenizer.convert_ids_to_tokens(token)
    if "\ufffd" not in text or not isinstance(name, str):
        lost = isinstance(name, str) and name.startswith("\u2581") and not text.startswith(" ")
        return (" " + text if lost else text).encode()
    if found := _BYTE.fullmatch(name):
        return bytes([int(found[1], 16)])
    if all(letter in _LETTERS for letter in name):
        return bytes(_LETTERS[letter] for letter in name)
    return text.encode()


def _letters() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes with (GPT-2): printable bytes are themselves."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {**{chr(byte): byte for byte in plain}, **{chr(256 + i): byte for i, byte in enumerate(rest)}}


_LETTERS = _letters()
