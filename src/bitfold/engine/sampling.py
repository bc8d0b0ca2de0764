"""How the next token is chosen: what may be asked for, and the object that does it, for the loop and for the server.

Names and meanings are those of the OpenAI interface and of transformers; `tests/engine/test_sampling.py` holds every
filter to transformers' own on random logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bitfold.engine.grammar import Grammar, Matcher
from bitfold.errors import ModelError, UsageError

_NOT = float("-inf")
_LIKELY = 1e-3  # where the tokens above it hold enough, the rest of the vocabulary need not be sorted


@dataclass(frozen=True)
class Sampling:
    """What a text is asked to be.

    What is None is as the model's generation config says.

    Args:
        max_new_tokens: when to stop at the latest.
        temperature: 0 = always the most likely token.
        top_p: draw from the most likely tokens that together have this probability.
        seed: of the draws; the same seed gives the same text.
        top_k: draw from this many; 0 = from all.
        min_p: draw from those at least this likely, as a share of the most likely one's probability.
        typical_p: draw from those whose surprise is nearest to the expected one, that together have this probability
            (Meister et al. 2022).
        repetition_penalty: divides what speaks for tokens of the prompt and the text (Keskar et al. 2019); 1 = none.
        presence_penalty, frequency_penalty: taken from the logits of tokens of the new text, once and for each time.
        logit_bias: token -> what is added to its logit.
        stop: texts that end it; they are not part of it.
        grammar: what it must be a sentence of.

    Raises:
        UsageError: a value out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    stop: tuple[str, ...] = ()
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        _check(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _check(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _check(-(2**63) <= self.seed < 2**64, "seed", self.seed, "an integer of 64 bits")
        _check(self.top_k >= 0, "top_k", self.top_k, "0 (all) or more")
        _check(self.min_p is None or 0 <= self.min_p <= 1, "min_p", self.min_p, "0 to 1")
        _check(self.typical_p is None or 0 < self.typical_p <= 1, "typical_p", self.typical_p, "above 0 and at most 1")
        penalty = self.repetition_penalty
        _check(penalty is None or 0 < penalty < math.inf, "repetition_penalty", penalty, "above 0; 1 is none")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(math.isfinite(getattr(self, name)), name, getattr(self, name), "a finite number")
        for token, bias in self.logit_bias.items():
            _check(token >= 0 and not math.isnan(bias), "logit_bias", f"{token}:{bias}", "tokens and numbers")
        _check(all(self.stop), "stop", "an empty text", "what ends the text is some text")

    def filled(self, config: Any) -> Sampling:
        """With what is None from a generation config of transformers, or without effect where that is silent."""

        def value(name: str, none: float) -> float:
            own, theirs = getattr(self, name), getattr(config, name, None)
            return float(own if own is not None else none if theirs is None else theirs)

        return replace(
            self,
            min_p=value("min_p", 0.0),
            typical_p=value("typical_p", 1.0),
            repetition_penalty=value("repetition_penalty", 1.0),
        )


def _check(good: bool, name: str, value: object, wanted: str) -> None:
    if not good:
        raise UsageError(f"{value} makes no sense", where=name, hint=wanted)


class Sampler:
    """Chooses the tokens of one text, one after the other, and knows those that there are.

    Args:
        sampling: what is asked for, `filled`.
        prompt: tokens in front of the text.
        matcher: of the grammar, at its beginning.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = (), matcher: Matcher | None = None) -> None:
        self._asked, self._matcher, self._prompt = sampling, matcher, prompt
        self._generator = torch.Generator().manual_seed(sampling.seed % 2**63)
        self._seen: Tensor | None = None  # bool (vocabulary): tokens of the prompt and the text
        self._counts: Tensor | None = None  # float32 (vocabulary): of the text
        self._bias: tuple[Tensor, Tensor] | None = None  # tokens, and what is added to them
        self._begun = False

    def _begin(self, vocabulary: int) -> None:
        asked = self._asked
        self._bias = _bias(asked.logit_bias, vocabulary)
        if asked.repetition_penalty not in (None, 1.0):
            self._seen = torch.zeros(vocabulary, dtype=torch.bool)
            self._seen[torch.tensor(self._prompt, dtype=torch.int64)] = True
        if asked.presence_penalty or asked.frequency_penalty:
            self._counts = torch.zeros(vocabulary)
        self._begun = True

    def choose(self, logits: Tensor) -> int:
        """The next token, which is part of the text from now on.

        Args:
            logits: float32 (vocabulary), of what follows the text; not changed.

        Raises:
            ModelError: no token can be chosen, since logits are not numbers.
            UsageError: a bias for a token that there is not.
        """
        token = self._chosen(self.scores(logits))
        self._note(token)
        return token

    @property
    def enough(self) -> int | None:
        """How many of the largest logits are enough to choose by, see `choose_of`; None: all are needed."""
        asked = self._asked
        plain = asked.repetition_penalty in (None, 1.0) and not (asked.presence_penalty or asked.frequency_penalty)
        if not plain or asked.logit_bias or self._matcher is not None:
            return None
        return 1 if asked.temperature == 0 else asked.top_k or None

    def choose_of(self, values: Tensor, tokens: Tensor) -> int:
        """As `choose`, by the `enough` largest logits.

        Args:
            values: float32 (enough).
            tokens: int64 (enough), whose they are.
        """
        tokens, order = tokens.sort()  # as in the whole vocabulary: the same seed draws the same
        values = values[order]
        scores = _filtered(values, self._asked) if self._asked.temperature > 0 else values
        return int(tokens[self._chosen(scores)])

    def _chosen(self, scores: Tensor) -> int:
        best, at = scores.max(0)
        if not math.isfinite(best):
            raise ModelError(f"the model's best logit is {float(best)}: no token can be chosen")
        return _draw(scores - best, self._generator) if self._asked.temperature > 0 else int(at)

    def _note(self, token: int) -> None:
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        if self._matcher is not None:
            self._matcher.consume(token)

    @property
    def complete(self) -> bool:
        """Whether the grammar allows nothing more."""
        return self._matcher is not None and self._matcher.stopped

    def scores(self, logits: Tensor) -> Tensor:
        """Logits of the distribution that is drawn from, -inf where a token cannot be; (vocabulary)."""
        scores = self._penalized(logits)
        if self._matcher is not None:
            scores = scores.masked_fill(~self._matcher.allowed(len(scores)), _NOT)
        return _filtered(scores, self._asked) if self._asked.temperature > 0 else scores

    def _penalized(self, logits: Tensor) -> Tensor:
        asked, scores = self._asked, logits
        if not self._begun:
            self._begin(len(logits))
        if self._seen is not None:
            penalty = asked.repetition_penalty or 1.0
            scores = torch.where(self._seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
        if self._counts is not None:
            scores = scores - asked.frequency_penalty * self._counts - asked.presence_penalty * (self._counts > 0)
        if self._bias is not None:
            scores = scores.index_add(0, *self._bias)
        return scores


def _bias(bias: Mapping[int, float], vocabulary: int) -> tuple[Tensor, Tensor] | None:
    if not bias:
        return None
    if (last := max(bias)) >= vocabulary:
        raise UsageError(f"there is no token {last}", where="logit_bias", hint=f"the model has {vocabulary} of them")
    return torch.tensor(list(bias)), torch.tensor(list(bias.values()), dtype=torch.float32)


def _filtered(scores: Tensor, asked: Sampling) -> Tensor:
    """Temperature and filters, in the order of transformers; each sees what the one before has left."""
    scores = (scores - scores.max()) / asked.temperature  # shifted first: the smallest temperature overflows nothing
    if 0 < asked.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(asked.top_k).values[-1], _NOT)
    if asked.top_p < 1:
        scores = _top_p(scores, asked.top_p)
    if asked.min_p:
        scores = scores.masked_fill(scores < math.log(asked.min_p), _NOT)
    if asked.typical_p is not None and asked.typical_p < 1:
        scores = _typical(scores, asked.typical_p)
    return scores


def _top_p(scores: Tensor, top_p: float) -> Tensor:
    """The most likely tokens, up to the one with which they have the probability.

    Those below (1 - p) / n cannot be among them, since all of these together are less likely than 1 - p.
    """
    p = scores.softmax(0)
    for least in (_LIKELY, (1 - top_p) / len(p)):
        likely = (p >= least).nonzero()[:, 0]
        if float(p[likely].sum()) >= top_p:
            break
    found, order = p[likely].sort(descending=True)
    before = found.cumsum(0) - found
    kept = likely[order[: max(1, int((before < top_p).sum()))]]
    return torch.full_like(scores, _NOT).index_copy(0, kept, scores[kept])


def _typical(scores: Tensor, mass: float) -> Tensor:
    """Locally typical sampling."""
    log_p = scores.log_softmax(0)
    p = log_p.exp()
    entropy = -(log_p * p).nansum()
    far, order = (-log_p - entropy).abs().sort()
    last = min(int((p[order].cumsum(0) < mass).sum()), len(p) - 1)
    return scores.masked_fill((-log_p - entropy).abs() > far[last], _NOT)


def _draw(scores: Tensor, generator: torch.Generator) -> int:
    """One draw from the softmax of scores whose largest is 0, by one number between 0 and 1: exact in float64."""
    tokens = (scores > _NOT).nonzero()[:, 0]
    reached = scores[tokens].exp().cumsum(0, dtype=torch.float64)
    at = torch.rand(1, generator=generator, dtype=torch.float64) * reached[-1]
    return int(tokens[min(int(torch.searchsorted(reached, at, right=True)), len(tokens) - 1)])
