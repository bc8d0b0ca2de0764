"""What the scheduler asks of a decoder: the engine's, or a stand-in for models that it does not run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


def common(text: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens two texts begin with alike; the last one of `ids` is left out, for its logits are wanted."""
    count = 0
    for old, new in zip(text, ids[:-1], strict=False):
        if old != new:
            break
        count += 1
    return count


class Steps(Protocol):
    """Several texts at a time; `bitfold.engine.decoder.Decoder` says what each part means."""

    texts: list[list[int]]

    @property
    def positions(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def cache_bytes(self) -> int: ...
    @property
    def working_bytes(self) -> int: ...
    def keep(self, ids: Sequence[int], sequence: int = 0) -> int: ...
    def copy(self, source: int, target: int, tokens: int) -> None: ...
    @property
    def guesses(self) -> bool: ...  # whether `wanted` may be more than 1 and `texts` be shortened
    def step(self, work: Sequence[tuple[int, Sequence[int]]], wanted: Sequence[int] | None = None) -> Tensor: ...
