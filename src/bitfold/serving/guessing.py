"""Guesses at what texts go on with, read along with their new tokens where a pass has few rows to spare.

As for one text alone (`bitfold.engine.lookup`): a guess is kept where the token that is chosen anyway agrees with it,
so nothing about the texts changes.
"""

from __future__ import annotations

from collections.abc import Sequence

from bitfold.engine.lookup import MOST, Lookup, Payoff
from bitfold.serving.job import Job

_ROWS = MOST + 1  # of a pass: as many as kernels round as they round one


class Guessing:
    """Decides how many guesses the texts of a pass have, from what passes of the same texts took and brought.

    Args:
        most: guesses for a text alone; None: as many as pay, 0: none.
    """

    def __init__(self, most: int | None = None) -> None:
        self._always, self._most = most is not None, MOST if most is None else most
        self._texts: list[Job] = []
        self._lookups: list[Lookup] = []
        self._payoff = Payoff(0)

    def guess(self, texts: Sequence[Job]) -> list[list[int]]:
        """For each text that is being written what may follow its next token; none where rows are few."""
        each = min(self._most, _ROWS // max(1, len(texts)) - 1)
        if each < 1:
            self._texts = []
            return [[] for _ in texts]
        if self._texts != list(texts):
            self._texts, self._lookups = list(texts), [Lookup([*text.asked.ids, *text.ids]) for text in texts]
            self._payoff = Payoff(each, always=self._always)
        wanted = self._payoff.wanted()
        found = []
        for text, lookup in zip(texts, self._lookups, strict=True):
            for token in text.ids[lookup.length - len(text.asked.ids) :]:
                lookup.add(token)
            found.append(lookup.guess(min(wanted, text.asked.limit - len(text.ids) - 1)))
        return found

    def note(self, guesses: Sequence[Sequence[int]], tokens: int, seconds: float) -> None:
        """The pass that read these brought so many tokens in all, and took so long."""
        if self._texts:
            self._payoff.note(max(map(len, guesses)), tokens / len(guesses), seconds)
