"""Which of several ways to store each tensor, so that errors cost least within a size: an exact choice.

A knapsack with one choice from each group. All sums of sizes that could be part of the best choice are kept, each with
its least cost: a tensor is added to the sums of those before it, and whatever is both larger and worse than another sum
is forgotten. Models have few different shapes, so there are few different sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitfold.errors import UsageError
from bitfold.system.units import size_text

_SUMS = 1 << 17  # kept at most; with more of them, neighbours within a 131072th of the largest count as one


def allocate(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The number of the choice for each tensor: the least sum of costs whose sizes sum up to no more than the budget.

    Args:
        costs: of each choice for each tensor, in any unit that can be added up.
        sizes: of the same choices, in bytes.
        budget: in bytes, for all of them.

    Raises:
        UsageError: the smallest choices are too large together.
    """
    needed = sum(min(few) for few in sizes)  # at least, by what is still to come
    if needed > budget:
        raise UsageError(f"at most {size_text(budget)} are wanted, the smallest choice takes {size_text(needed)}")
    size, cost = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for more, bytes_ in zip(costs, sizes, strict=True):
        needed -= min(bytes_)
        size, cost, before, choice = _extended(size, cost, more, bytes_, budget - needed)
        steps.append((before, choice))
    at, found = len(cost) - 1, []  # larger sums cost less, so the last one is the best
    for before, choice in reversed(steps):
        found.append(int(choice[at]))
        at = int(before[at])
    return found[::-1]


def _extended(
    size: np.ndarray, cost: np.ndarray, more: Sequence[float], bytes_: Sequence[int], limit: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sums with one tensor more, ascending in size and descending in cost; from which sum and choice each comes."""
    sizes = (np.asarray(bytes_, np.int64)[:, None] + size).ravel()
    costs = (np.asarray(more, np.float64)[:, None] + cost).ravel()
    before, choice = np.tile(np.arange(len(size)), len(more)), np.repeat(np.arange(len(more)), len(size))
    order = np.lexsort((costs, sizes))
    order = order[sizes[order] <= limit]
    best = np.minimum.accumulate(costs[order])
    order = order[np.concatenate([[True], costs[order][1:] < best[:-1]])]
    if len(order) > _SUMS:
        step = int(sizes[order[-1]] // _SUMS + 1)
        last = np.diff(sizes[order] // step, append=-1) != 0
        last[0] = True  # the smallest: what follows may have room for nothing else
        order = order[last]
    return sizes[order], costs[order], before[order], choice[order]
