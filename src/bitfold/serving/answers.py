"""Answers in OpenAI's shapes: whole ones, and the chunks of streams."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from bitfold.serving.job import Job, Piece, TokenChance
from bitfold.serving.preparing import token_bytes


class Answer:
    """Builds the answer of one request.

    Args:
        model: its name.
        tokenizer: of transformers.
        chat: whether it is that of a chat.
    """

    def __init__(self, model: str, tokenizer: Any, *, chat: bool) -> None:
        self._model, self._tokenizer, self._chat = model, tokenizer, chat
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def whole(self, jobs: Sequence[Job], pieces: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """Everything at once; pieces of each of the jobs."""
        choices = [self._choice(i, found) for i, found in enumerate(pieces)]
        return {**self._head(stream=False), "choices": choices, "usage": usage(jobs)}

    def first(self) -> dict[str, Any]:
        """What a stream of a chat begins with: who speaks."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])

    def piece(self, index: int, piece: Piece, before: int) -> dict[str, Any]:
        """A chunk of a stream; `before`: letters of that text that were sent already."""
        text: dict[str, Any] = {"delta": {"content": piece.text} if piece.text else {}} if self._chat else {}
        if not self._chat:
            text = {"text": piece.text}
        chances = self._chances(piece.chances, before)
        return self._chunk([{"index": index, **text, "logprobs": chances, "finish_reason": piece.finish}])

    def last(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """The chunk with the numbers of tokens."""
        return {**self._chunk([]), "usage": usage(jobs)}

    def _head(self, *, stream: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if stream else "chat.completion") if self._chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head(stream=True), "choices": choices}

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        chances = self._chances([chance for piece in pieces for chance in piece.chances], 0)
        message = {"role": "assistant", "content": text, "refusal": None}
        body: dict[str, Any] = {"message": message} if self._chat else {"text": text}
        return {"index": index, **body, "logprobs": chances, "finish_reason": pieces[-1].finish}

    def _chances(self, chances: Sequence[TokenChance], before: int) -> dict[str, Any] | None:
        if not chances:
            return None
        if self._chat:
            return {"content": [self._chat_chance(chance) for chance in chances], "refusal": None}
        tokens = [self._text(chance.token) for chance in chances]
        starts = [before + sum(map(len, tokens[:i])) for i in range(len(tokens))]
        return {
            "tokens": tokens,
            "token_logprobs": [chance.logprob for chance in chances],
            "top_logprobs": [{self._text(t): p for t, p in chance.top} for chance in chances],
            "text_offset": starts,
        }

    def _chat_chance(self, chance: TokenChance) -> dict[str, Any]:
        top = [self._token(token, logprob) for token, logprob in chance.top]
        return {**self._token(chance.token, chance.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._text(token), "logprob": logprob, "bytes": list(token_bytes(self._tokenizer, token))}

    def _text(self, token: int) -> str:
        return token_bytes(self._tokenizer, token).decode(errors="replace")


def usage(jobs: Sequence[Job]) -> dict[str, Any]:
    """Numbers of tokens."""
    prompt, made = sum(len(job.asked.ids) for job in jobs), sum(job.made for job in jobs)
    cached = {"cached_tokens": sum(job.reused for job in jobs)}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": cached,
    }


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"
