"""How fast a model writes on this machine, beside what the machine could do at most."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from bitfold.engine.decoder import Decoder
from bitfold.errors import UsageError
from bitfold.system import native

_READ = 1 << 29  # bytes, more than caches hold
_TURNS = 5


@dataclass(frozen=True)
class Speed:
    """Figures of one number of threads and of sequences; medians.

    Args:
        threads: how many.
        sequences: that are written side by side.
        prompt_tokens, tokens: read at once, and written one by one.
        prefill, decode: tokens per second of both; of all sequences together.
        first_token: seconds from the prompt to the first token.
        token_bytes: weights that a token reads.
        cache_bytes, working_bytes: memory of keys and values, and of reading, besides the model's.
        bandwidth: bytes per second that as many threads read from memory in the same run.
    """

    threads: int
    sequences: int
    prompt_tokens: int
    tokens: int
    prefill: float
    decode: float
    first_token: float
    token_bytes: int
    cache_bytes: int
    working_bytes: int
    bandwidth: float

    @property
    def share(self) -> float:
        """Of the bandwidth, that decoding reads weights with: once for a token of each sequence."""
        return self.token_bytes * self.decode / self.sequences / self.bandwidth

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "share": self.share}


def measure(
    model: nn.Module,
    *,
    threads: Sequence[int],
    sequences: Sequence[int] = (1,),
    cache: str = "auto",
    prompt: int = 512,
    tokens: int = 64,
    turns: int = 3,
) -> list[Speed]:
    """Read a prompt of random tokens, write some more; several turns, medians.

    Args:
        model: a loaded causal language model.
        threads: numbers of threads to try.
        sequences: numbers of texts to write side by side, each with each number of threads.
        cache: how keys and values are kept, see `Decoder`.
        prompt, tokens: lengths.
        turns: of each.

    Raises:
        Unsupported: the engine has no code for the model.
        UsageError: no prompt, or nothing to write.
    """
    if prompt < 1 or tokens < 1 or turns < 1:
        raise UsageError("a prompt, tokens and turns are at least 1")
    if min(sequences) < 1:
        raise UsageError("a number of sequences is at least 1")
    return [
        _measure(Decoder(model, prompt + tokens, count, texts, cache), count, prompt, tokens, turns)
        for count in threads
        for texts in sequences
    ]


def _measure(decoder: Decoder, threads: int, prompt: int, tokens: int, turns: int) -> Speed:
    ids = torch.randint(0, decoder.vocabulary, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    decoder.extend(ids[:8])  # memory is touched, threads are there
    bandwidth, texts = _bandwidth(threads), len(decoder.texts)
    first, steps = [], []
    for _ in range(turns):
        for text in decoder.texts:
            text.clear()
        logits, seconds = _timed(lambda: decoder.step([(0, ids)]))
        first.append(seconds)
        for other in range(1, texts):
            decoder.copy(0, other, prompt)
        new = [int(logits.argmax())] * texts
        for _ in range(tokens - 1):
            logits, seconds = _timed(lambda new=new: decoder.step([(i, [token]) for i, token in enumerate(new)]))  # type: ignore[misc]
            steps.append(seconds)
            new = logits.argmax(-1).tolist()
    begin, step = statistics.median(first), statistics.median(steps or first)
    return Speed(
        threads,
        texts,
        prompt,
        tokens,
        prompt / begin,
        texts / step,
        begin,
        decoder.token_bytes,
        decoder.cache_bytes,
        decoder.working_bytes,
        bandwidth,
    )


def _timed(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def _bandwidth(threads: int) -> float:
    """Bytes per second, the best of some turns: what the machine can do when nobody disturbs."""
    core, data = native.core(), torch.ones(_READ, dtype=torch.uint8)
    assert core is not None
    best = 0.0
    for _ in range(_TURNS):
        start = time.perf_counter()
        core.read_memory(data.data_ptr(), _READ, threads)
        best = max(best, _READ / (time.perf_counter() - start))
    return best
