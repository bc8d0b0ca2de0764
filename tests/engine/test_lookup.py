"""Guesses: where they come from, and that they stop when they do not pay."""

from __future__ import annotations

import random

from bitfold.engine.lookup import Lookup, Payoff


def test_what_followed_last_time():
    lookup = Lookup([1, 2, 3, 4, 5, 1, 2, 3])
    assert lookup.guess(8) == [4, 5, 1, 2, 3]
    assert lookup.guess(2) == [4, 5]
    lookup.add(9)
    assert lookup.guess(8) == []
    for token in (1, 2, 3):
        lookup.add(token)
    assert lookup.guess(1) == [9]
    assert Lookup([1, 2]).guess(3) == []


def simulate(payoff: Payoff, right: float, cost: float, tokens: int, disturbed: float = 0.0) -> float:
    """Seconds of a text whose guesses are right so often; a pass of m more rows takes 1 + m * cost.

    As often as `disturbed` a measurement is 30 times as long, which is not counted.
    """
    draw = random.Random(0)
    seconds, done, luck = 0.0, 0, 0.0
    while done < tokens:
        guesses = payoff.wanted()
        good, luck = 0, luck + right
        while good < guesses and luck >= 1:
            good, luck = good + 1, luck - 1 + right
        took = 1 + guesses * cost
        payoff.note(guesses, good + 1, took * (30 if draw.random() < disturbed else 1))
        seconds += took
        done += good + 1
    return seconds


def test_a_text_without_repetitions_loses_next_to_nothing():
    for cost in (0.1, 0.3, 1.0):
        assert simulate(Payoff(), 0.0, cost, 300) < 1.03 * 300
        assert simulate(Payoff(always=True), 0.0, cost, 300) > 1.03 * 300


def test_a_text_with_repetitions_gains():
    assert simulate(Payoff(), 0.9, 0.1, 1000) < 500


def test_a_busy_machine_misleads_nobody():
    assert simulate(Payoff(), 0.9, 0.1, 1000, disturbed=0.2) < 500
    assert simulate(Payoff(), 0.0, 0.5, 1000, disturbed=0.2) < 1030


def test_no_guesses_where_none_are_wanted():
    payoff = Payoff(0)
    payoff.note(0, 1, 1.0)
    assert payoff.wanted() == 0
    assert Payoff(4, always=True).wanted() == 4
