"""Guesses at what comes next, out of the text itself (prompt look-up), and whether guessing pays.

Texts repeat themselves: code that is edited, quotes, lists. Where the last tokens stood before, what followed them then
is read along with the new token, in one pass. A guess is kept where the token that is chosen anyway agrees with it, so
the text has the same distribution as without guesses (speculative sampling with a deterministic draft, Leviathan et
al. 2023), and with the same seed it is the same text.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST = 15  # guesses of a pass
_FEW = 3  # at first, and where they fail
_GRAM = 3  # tokens that must have stood before
_WEIGHT = 0.1  # of a new measurement in the mean
_SHARE = 0.015  # of the time of a text that failed guesses may cost
_ADVANCE = 2  # and passes of one token, before there is such a time
_CREDIT = 8  # passes: what successful guesses may cost when they begin to fail


class Lookup:
    """Where every sequence of `_GRAM` tokens of a text stood last.

    Args:
        ids: the text so far; it grows by `add`.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        """One more token of the text."""
        if len(self._ids) >= _GRAM:
            self._after[tuple(self._ids[-_GRAM:])] = len(self._ids)
        self._ids.append(token)

    def guess(self, most: int) -> list[int]:
        """What followed the last tokens where they stood before; up to `most`, none where they did not."""
        at = self._after.get(tuple(self._ids[-_GRAM:])) if len(self._ids) >= _GRAM else None
        return [] if at is None else self._ids[at : at + most]


class Payoff:
    """Decides how many guesses a pass reads, from what passes took and brought in this text.

    What guesses have cost (seconds beyond those that as many passes of one token would have taken) never gets beyond
    a small share of the time of the text: where they fail they are tried now and then, where they pay they go on.

    Args:
        most: guesses of a pass at most; 0 = none.
        always: whatever they cost.
    """

    def __init__(self, most: int = MOST, *, always: bool = False) -> None:
        self._most, self._always = most, always
        self._single: float | None = None  # seconds of a pass of one token
        self._lost, self._spent = 0.0, 0.0  # seconds
        self._failure = 0.0  # seconds that a pass loses whose guesses are all wrong
        self._length = min(most, _FEW)

    def wanted(self) -> int:
        """How many guesses the next pass should have."""
        if self._always or not self._most:
            return self._most
        if self._single is None:
            return 0  # what guesses are compared with is not known yet
        allowed = _SHARE * self._spent + _ADVANCE * self._single
        return self._length if self._lost + self._failure <= allowed else 0

    def note(self, guesses: int, tokens: int, seconds: float) -> None:
        """A pass with so many guesses took so long and brought so many tokens."""
        self._spent += seconds
        if guesses == 0:
            self._single = seconds if self._single is None else (1 - _WEIGHT) * self._single + _WEIGHT * seconds
        elif self._single is not None:
            self._failure = seconds - self._single
            lost = self._lost + seconds - tokens * self._single
            self._lost = max(lost, -_CREDIT * self._single)  # a text may change its ways
            right = tokens - 1
            self._length = min(self._most, 2 * self._length if right == guesses else max(_FEW, right + 1))
