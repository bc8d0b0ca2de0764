"""Statistics summed in groups of windows: the same bits whoever heard the groups, and close to float64's."""

from __future__ import annotations

import pytest
import torch

from bitfold.calibration.statistics import WINDOWS, Sums, Wanted


def windows(count: int, k: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Inputs, those of the original model, weights of the tokens."""
    g = torch.Generator().manual_seed(k)
    return [
        (torch.randn(24, k, generator=g), torch.randn(24, k, generator=g), torch.rand(24, 1, generator=g))
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    "wanted", [Wanted(False), Wanted(True), Wanted(True, 256, lambda v: v.flip(-1))], ids=["one", "both", "turned"]
)
@pytest.mark.parametrize("k", [40, 1100])
def test_groups_that_others_have_heard(k: int, wanted: Wanted) -> None:
    """Any assignment of groups to processes gives the bits of one process."""
    given = windows(2 * WINDOWS + 1, k)
    alone, together = Sums((4, k), wanted), Sums((4, k), wanted)
    for number, one in enumerate(given):
        alone.add(*one)
        if number % WINDOWS == WINDOWS - 1:
            alone.close()
    for first in range(0, len(given), WINDOWS):
        part = Sums((4, k), wanted)
        for one in given[first : first + WINDOWS]:
            part.add(*one)
        together.take(part.part())
    ours, theirs = alone.statistics(), together.statistics()
    for name in ("hessian", "cross", "absmax", "mean"):
        a, b = getattr(ours, name), getattr(theirs, name)
        pairs = zip(getattr(a, "parts", [a]), getattr(b, "parts", [b]), strict=True)
        assert all(x is y is None or torch.equal(x, y) for x, y in pairs)
    assert ours.tokens == theirs.tokens == 24 * len(given)
    if wanted.basis is None:
        exact = sum(((x * w).double().T @ x.double() for x, _, w in given), torch.zeros(k, k).double()) / ours.tokens
        error = (ours.hessian - exact).abs().max() / exact.abs().max()  # type: ignore[operator]
        assert error < 24 * WINDOWS * torch.finfo(torch.float32).eps


def test_nothing_was_heard() -> None:
    sums = Sums((4, 8))
    sums.take(Sums((4, 8)).part())
    assert torch.equal(sums.statistics().hessian, torch.zeros(8, 8))  # type: ignore[arg-type]
