"""The choice of least cost within a size, against all choices there are."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from bitfold.errors import UsageError
from bitfold.planning import allocation
from bitfold.planning.allocation import allocate


def best(costs, sizes, budget):
    every = product(*(range(len(few)) for few in costs))
    fits = [c for c in every if sum(s[i] for s, i in zip(sizes, c, strict=True)) <= budget]
    return min((sum(x[i] for x, i in zip(costs, c, strict=True)) for c in fits), default=None)


@pytest.mark.parametrize("seed", range(20))
def test_least_cost_of_all_choices(seed):
    rng = np.random.default_rng(seed)
    costs = [rng.random(rng.integers(1, 5)).tolist() for _ in range(6)]
    sizes = [rng.integers(1, 30, len(few)).tolist() for few in costs]
    least = sum(min(few) for few in sizes)
    for budget in (least, least + 7, least + 40, 1000):
        choice = allocate(costs, sizes, budget)
        assert sum(s[i] for s, i in zip(sizes, choice, strict=True)) <= budget
        assert sum(c[i] for c, i in zip(costs, choice, strict=True)) == pytest.approx(best(costs, sizes, budget))


def test_too_small_a_budget_is_refused():
    with pytest.raises(UsageError, match="smallest choice takes 12"):
        allocate([[1.0, 2.0], [1.0]], [[10, 5], [7]], 11)


def test_many_sums_are_thinned_out_and_still_fit(monkeypatch):
    monkeypatch.setattr(allocation, "_SUMS", 64)
    rng = np.random.default_rng(0)
    sizes = [(1000 * rng.random(4) + 1).astype(int).tolist() for _ in range(40)]
    costs = [[1 / size for size in few] for few in sizes]
    for budget in (sum(min(few) for few in sizes), 20000):
        choice = allocate(costs, sizes, budget)
        assert sum(s[i] for s, i in zip(sizes, choice, strict=True)) <= budget


def test_nothing_to_choose():
    assert allocate([], [], 0) == []
