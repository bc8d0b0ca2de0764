"""Guesses at what comes next, out of the text itself (prompt look-up), and whether guessing pays.

Texts repeat themselves: code that is edited, quotes, lists. Where the last tokens stood before, what followed them then
is read along with the new token, in one pass. A guess is kept where the token that is chosen anyway agrees with it, so
the text has the same distribution as without guesses (speculative sampling with a deterministic draft, Leviathan et
al. 2023), and with the same seed it is the same text.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST = 7  # guesses of a pass: with the new token eight rows, which kernels round as they round one
_FEW = 3  # at first, and where they fail
_GRAM = 3  # tokens that must have stood before
_SHARE = 0.01  # of the tokens of a text that failed guesses may cost, in passes of one token
_ADVANCE = 1  # the same before there are tokens
_CREDIT = 8  # what guesses that were right have earned for those that fail, at most


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

    @property
    def length(self) -> int:
        """Tokens of the text."""
        return len(self._ids)

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

    Counted in passes of one token. What guesses have cost (the time of their passes, less the tokens that these
    brought) never gets beyond a small share of the tokens: where they fail they are tried now and then, where they
    pay they go on.

    Args:
        most: guesses of a pass at most; 0 = none.
        always: whatever they cost.
    """

    def __init__(self, most: int = MOST, *, always: bool = False) -> None:
        self._most, self._always = most, always
        self._single: float | None = None  # seconds of a pass of one token
        self._costs: dict[int, float] = {}  # seconds of a pass, by its guesses
        self._tokens, self._lost = 0.0, 0.0
        self._failure = 0.0  # what a pass loses whose guesses are all wrong
        self._length = min(most, _FEW)

    def wanted(self) -> int:
        """How many guesses the next pass should have."""
        if self._always or not self._most:
            return self._most
        if self._single is None:
            return 0  # what guesses are compared with is not known yet
        return self._length if self._lost + self._failure <= _SHARE * self._tokens + _ADVANCE else 0

    def note(self, guesses: int, tokens: float, seconds: float) -> None:
        """A pass with so many guesses took so long and brought so many tokens (of several texts: on average)."""
        self._tokens += tokens
        if guesses == 0:
            self._single = _steady(self._single, seconds)
        elif self._single is not None:
            bounded = min(seconds, (guesses + 1) * self._single)  # more than that is the machine's doing
            self._costs[guesses] = _steady(self._costs.get(guesses), bounded)
            cost = self._costs[guesses] / self._single
            self._failure = cost - 1
            self._lost = max(self._lost + cost - tokens, -_CREDIT)  # a text may change its ways
            right = int(tokens) - 1
            self._length = min(self._most, 2 * self._length if right == guesses else max(_FEW, right + 1))


def _steady(old: float | None, new: float) -> float:
    """Goes down quickly and up slowly: what disturbs a measurement makes it longer."""
    if old is None:
        return new
    return old + (0.3 * (new - old) if new < old else 0.05 * (min(new, 2 * old) - old))
