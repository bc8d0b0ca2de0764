"""Layers that share their input, solved together: one Hessian, one rotation, one factorization.

Their weights are stacked, rows upon rows, wherever the format lets rows be taken apart again: a coder then gets enough
rows to fill its vectors, and the feedback runs once instead of once for each layer. No number changes by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bitfold.calibration import Statistics
from bitfold.errors import BitfoldError
from bitfold.fits import get_fit
from bitfold.formats import AnyFormat, get_format
from bitfold.models.swap import in_basis, transform_of
from bitfold.plan import Decision
from bitfold.qtensor import QTensor, rows_stack, split_rows
from bitfold.recipe import Rule
from bitfold.solvers import get_solver
from bitfold.solvers.ldlq import proxy_loss

_RIDGE = 0.02  # of the mean diagonal, in the drift correction


@dataclass(frozen=True)
class Solved:
    """One layer done: what it is now, what it was in the same basis, and the relative error of its output."""

    decision: Decision
    qtensor: QTensor
    weight: torch.Tensor
    output_error: float


def solve_group(
    model: nn.Module, decisions: Sequence[Decision], statistics: Statistics, *, drift: float, seed: int
) -> Iterator[Solved]:
    """Quantize the layers of one input; the model gets the quantized weights.

    Args:
        model: with the weights of these layers in memory, float32.
        decisions: one for each layer, each with a rule.
        statistics: of their input.
        drift: strength of the drift correction, 0 to 1.
        seed: of rotations and solvers.

    Raises:
        BitfoldError: with the name of the tensor.
    """
    for rule in dict.fromkeys(_rule(d) for d in decisions):
        alike = [d for d in decisions if d.rule == rule]
        yield from _solve_alike(model, rule, alike, statistics, drift, seed)


def _rule(decision: Decision) -> Rule:
    assert decision.rule is not None
    return decision.rule


def _solve_alike(
    model: nn.Module, rule: Rule, decisions: list[Decision], statistics: Statistics, drift: float, seed: int
) -> Iterator[Solved]:
    """Layers of one input under one rule."""
    first = decisions[0].site
    assert first is not None
    transform = transform_of(rule, first, seed)
    weights = [_weight(model, d) for d in decisions]
    aimed = statistics.target(torch.cat(weights), drift, damp=_RIDGE)
    turned = aimed if transform is None else transform(aimed)
    hessian = statistics.hessian if transform is None else transform.hessian(statistics.hessian)
    wholes = torch.split(turned, [len(w) for w in weights])
    for decision, w, part, q in zip(
        decisions, weights, wholes, _code(rule, decisions, wholes, hessian, seed), strict=True
    ):
        decoded = q.dequantize()
        _put(model, decision, decoded if transform is None else transform.inverse(decoded))
        yield Solved(decision, q, w if transform is None else transform(w), proxy_loss(part, decoded, hessian))


def _code(
    rule: Rule, decisions: list[Decision], parts: Sequence[torch.Tensor], hessian: torch.Tensor, seed: int
) -> list[QTensor]:
    """Stacked where rows can be taken apart again, one after the other elsewhere."""
    format = get_format(rule.format)
    shapes = [(len(p), p.shape[1]) for p in parts]
    if rows_stack(format, shapes):
        name = ", ".join(d.tensor for d in decisions)
        return split_rows(_solve(rule, format, torch.cat(list(parts)), hessian, seed, name), shapes)
    return [_solve(rule, format, p, hessian, seed, d.tensor) for d, p in zip(decisions, parts, strict=True)]


def _solve(rule: Rule, format: AnyFormat, w: torch.Tensor, hessian: torch.Tensor, seed: int, name: str) -> QTensor:
    try:
        return get_solver(rule.solver)(w, hessian, format, get_fit(rule.fit), seed=seed)
    except BitfoldError as error:
        raise type(error)(error.what, where=name, hint=error.hint) from error


def _weight(model: nn.Module, decision: Decision) -> torch.Tensor:
    """(n, k) float32, inputs last."""
    assert decision.site is not None
    owner: Any = model.get_submodule(decision.site.module)
    return in_basis(owner._parameters[decision.site.parameter].detach(), decision.site, None).float()


def _put(model: nn.Module, decision: Decision, w: torch.Tensor) -> None:
    assert decision.site is not None
    owner: Any = model.get_submodule(decision.site.module)
    value = w.T if decision.site.transposed else w
    owner._parameters[decision.site.parameter] = nn.Parameter(value, requires_grad=False)
