"""One text that was asked for, from the queue to its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from bitfold.engine.sampling import Sampler
from bitfold.engine.stream import TextStream

_NEVER = -9999.0  # what OpenAI says for a logarithm of next to nothing


@dataclass(frozen=True)
class TokenChance:
    """A token, and how likely the model found it.

    Args:
        token: its number.
        logprob: natural logarithm of its probability, by the model's own logits.
        top: the likeliest tokens in its place, likeliest first, with theirs.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """What came of a text since the last piece.

    Args:
        text: that became certain.
        chances: of its tokens, if they were asked for.
        finish: with the last piece why the text ended: "stop" or "length".
        error: in place of a text's end: why there will be none.
    """

    text: str = ""
    chances: tuple[TokenChance, ...] = ()
    finish: str | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class Asked:
    """What is wanted of a text.

    Args:
        ids: the prompt.
        limit: tokens at most.
        ends: tokens that end it.
        chances: None, or how many of the likeliest tokens are wanted beside each.
    """

    ids: Sequence[int]
    limit: int
    ends: frozenset[int]
    chances: int | None = None


class Receiver(Protocol):
    """Is told of pieces, in the thread of the scheduler; must not block."""

    def __call__(self, piece: Piece) -> None: ...


@dataclass
class Job:
    """A text that is waiting or being written.

    Args:
        asked: what is wanted.
        sampler, stream: choose its tokens and make text of them.
        send: gets the pieces.
    """

    asked: Asked
    sampler: Sampler
    stream: TextStream
    send: Receiver
    ids: list[int] = field(default_factory=list)  # tokens that were made
    reused: int = 0  # tokens of the prompt that need not be read
    gone: bool = False  # nobody wants it any more
    clock: dict[str, float] = field(default_factory=dict)  # when it was asked for, began, had its first token
    _chances: list[TokenChance] = field(default_factory=list)

    @property
    def made(self) -> int:
        """How many tokens there are."""
        return len(self.ids)

    def advance(self, logits: Tensor) -> int | None:
        """Choose a token and send what it brings; the token, or None if the text ends.

        Args:
            logits: float32 (vocabulary).
        """
        token = self.sampler.choose(logits)
        self.ids.append(token)
        if token in self.asked.ends:
            self._send(self.stream.finish(), "stop")
            return None
        if self.asked.chances is not None:
            self._chances.append(chance(logits, token, self.asked.chances))
        text = self.stream.add(token)
        if self.stream.stopped:
            self._send(text, "stop")
        elif self.sampler.complete or self.made >= self.asked.limit:
            self._send(text + self.stream.finish(), "stop" if self.sampler.complete else "length")
        else:
            if text:
                self._send(text, None)
            return token
        return None

    def _send(self, text: str, finish: str | None) -> None:
        chances, self._chances = tuple(self._chances), []
        self.send(Piece(text, chances, finish))


def chance(logits: Tensor, token: int, top: int) -> TokenChance:
    """How likely a token was."""
    logprobs = logits.log_softmax(0)
    values, places = logprobs.topk(min(top, len(logprobs)))
    likeliest = zip(places.tolist(), values.clamp(min=_NEVER).tolist(), strict=True)
    return TokenChance(token, max(_NEVER, float(logprobs[token])), tuple(likeliest))
