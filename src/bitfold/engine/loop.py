"""Token after token: through the native decoder, or through transformers' loop where that must do it.

The tokens are chosen by the same `Sampler` in both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitfold.engine.decoder import Decoder, Unsupported
from bitfold.engine.lookup import MOST, Lookup, Payoff
from bitfold.engine.prompt_cache import PromptCache
from bitfold.engine.sampling import Sampler

OnToken = Callable[[int], bool]  # is told of each new token; whether the text ends with it

_ROOM = 256  # tokens by which the cache grows
# Settings of a generation config that only transformers' loop has code for; false, 0 and None mean: not wanted.
_OTHERS = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "constraints",
    "diversity_penalty",
    "encoder_no_repeat_ngram_size",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "penalty_alpha",
    "remove_invalid_values",
    "sequence_bias",
    "suppress_tokens",
    "top_h",
    "watermarking_config",
)


def require_plain(config: Any) -> None:
    """Unsupported for a generation config of transformers that asks for more than a `Sampler` can do."""
    if others := [name for name in _OTHERS if getattr(config, name, None)]:
        raise Unsupported(f"the model's generation config asks for {', '.join(others)}")


def end_tokens(config: Any) -> frozenset[int]:
    """Tokens that end a text, of a generation config."""
    ends = getattr(config, "eos_token_id", None)
    return frozenset() if ends is None else frozenset(ends if isinstance(ends, (list, tuple)) else [int(ends)])


def stop_texts(config: Any) -> tuple[str, ...]:
    """Texts that end a text, of a generation config."""
    stops = getattr(config, "stop_strings", None) or ()
    return (stops,) if isinstance(stops, str) else tuple(stops)


class Loop:
    """Generates with one model; keeps the cache, so that a text that goes on is not read again.

    Args:
        model: a causal language model on the CPU.
        guesses: tokens of a pass that may be guessed from the text before; None: as many as pay, by measurement.
        cache: how keys and values are kept, see `Decoder`.
        prompt_cache: a file that keeps those of the prompt.
        room: tokens that the first text will have; more come with more.

    Raises:
        Unsupported: the engine has no code for it.
        UsageError, CheckpointError: no such cache, or none for this model; no such file can be written.
    """

    def __init__(
        self,
        model: nn.Module,
        guesses: int | None = None,
        cache: str = "auto",
        prompt_cache: str | Path | None = None,
        room: int = _ROOM,
    ) -> None:
        self._model, self._cache = model, cache
        self._guesses = guesses
        self._decoder = self._made(room)
        self._file = None if prompt_cache is None else PromptCache(prompt_cache, model)

    def generate(
        self, ids: Sequence[int], sampler: Sampler, limit: int, ends: frozenset[int], on_token: OnToken
    ) -> list[int]:
        """The tokens that follow `ids`, at most `limit`; an end token is the last.

        Args:
            ids: the prompt.
            sampler: chooses them.
            limit: how many at most.
            ends: tokens that end the text.
            on_token: is told of each as it comes, and may end the text with it.
        """
        guesses = MOST if self._guesses is None else self._guesses
        self._make_room(len(ids) + limit)
        payoff = Payoff(guesses, always=self._guesses is not None)
        lookup = Lookup(ids) if guesses else None
        made: list[int] = []
        guessed: list[int] = []
        rows, start = self._read_prompt(ids, sampler), 0.0
        while True:
            before = len(made)
            for row, guess in zip(rows, [*guessed, None], strict=True):
                token = sampler.choose(row) if isinstance(row, Tensor) else sampler.choose_of(*row)
                made.append(token)
                if on_token(token) or token in ends or sampler.complete or len(made) >= limit:
                    self._forget(len(ids) + len(made) - 1)
                    return made
                if lookup is not None:
                    lookup.add(token)
                if token != guess:
                    break
            if start:
                payoff.note(len(guessed), len(made) - before, time.perf_counter() - start)
            self._forget(len(ids) + len(made) - 1)
            start = time.perf_counter()
            guessed = [] if lookup is None else lookup.guess(min(payoff.wanted(), limit - len(made) - 1))
            new = [made[-1], *guessed]
            rows = list(self._decoder.logits(new)) if guessed else self._read(new, sampler)

    def _read_prompt(self, ids: Sequence[int], sampler: Sampler) -> list[Tensor | tuple[Tensor, Tensor]]:
        if self._file is not None:
            self._file.load(self._decoder)
        kept = self._decoder.keep(ids)
        rows = self._read(list(ids[kept:]), sampler)
        if self._file is not None and kept + 1 < len(ids):
            self._file.save(self._decoder)
        return rows

    def _read(self, new: list[int], sampler: Sampler) -> list[Tensor | tuple[Tensor, Tensor]]:
        """Logits of what follows the last of them, or as many of the largest as are enough."""
        if sampler.enough is None or sampler.enough > self._decoder.vocabulary:
            return [self._decoder.extend(new)]
        values, tokens = self._decoder.best([(0, new)], sampler.enough)
        return [(values[0], tokens[0])]

    def _forget(self, length: int) -> None:
        """Tokens that were guessed and are not part of the text."""
        del self._decoder.ids[length:]

    def _make_room(self, tokens: int) -> None:
        if tokens > self._decoder.positions:
            self._decoder = self._made(tokens)

    def _made(self, tokens: int) -> Decoder:
        return Decoder(self._model, -(-tokens // _ROOM) * _ROOM, cache=self._cache)


def by_transformers(model: Any, ids: Tensor, config: Any, sampler: Sampler, on_token: OnToken) -> None:
    """The same through transformers' own loop: every family, every setting of its generation config.

    Args:
        model: of transformers.
        ids: int64 (1, tokens).
        config: its GenerationConfig; greedy, since `sampler` draws.
        sampler, on_token: as in `Loop.generate`.
    """
    from transformers import LogitsProcessor, StoppingCriteria

    class Chooses(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            chosen = torch.full_like(scores, float("-inf"))
            chosen[0, sampler.choose(scores[0].float().cpu())] = 0
            return chosen

    class Ends(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            ended = on_token(int(input_ids[0, -1])) or sampler.complete
            return torch.tensor([ended]).to(input_ids.device)

    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        logits_processor=[Chooses()],
        stopping_criteria=[Ends()],
    )
