"""One weight under one rule: its fit and solver bound to the Hessian, pruned where the rule says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from bitfold.errors import BitfoldError, UsageError
from bitfold.formats import get_format
from bitfold.methods.clip import clip
from bitfold.methods.fits import CALIBRATED_FITS, get_fit
from bitfold.methods.gptq import MoreDamping, no_zeros
from bitfold.methods.hessian import BlockDiagonal, Moments
from bitfold.methods.pruning import Fixed, SparseGPT, read_sparsity, wanda_mask
from bitfold.methods.solvers import get_solver, is_feedback
from bitfold.qtensor import QTensor
from bitfold.recipes.recipe import Rule
from bitfold.transforms import transform_spec

_ONLY = "only gptq and ldlq, with or without a rotation, take inputs in ranges"


def takes_ranges(rule: Rule) -> bool:
    """Whether the inputs of a layer under this rule can be taken in ranges, see hessian.py."""
    plain = rule.prune == "none" and rule.fit not in CALIBRATED_FITS and not transform_spec(rule.transform).diagonal
    return plain and is_feedback(rule.solver)


def solve(
    rule: Rule, w: torch.Tensor, hessian: Moments | None, seed: int, name: str, *, refit: bool = True
) -> tuple[QTensor, tuple[str, ...]]:
    """Quantize (and prune) a weight (n, k), in its basis, under the Hessian (k, k) of its inputs.

    Args:
        rule: how.
        w: the weight.
        hessian: None = there are no data: fits and solvers that want them do without, pruning goes by magnitude;
            squares of it only for rules that `takes_ranges`.
        seed: of the solver.
        name: for errors.
        refit: whether error feedback ends with a refit of the row scales, see `ldlq`.

    Returns:
        The weight, and what went otherwise than it should, in words.

    Raises:
        BitfoldError: with the name.
    """
    format = get_format(rule.format)
    if isinstance(hessian, BlockDiagonal) and not takes_ranges(rule):
        raise UsageError("this rule needs the Hessian of all inputs", where=name, hint=_ONLY)
    fit = clip(hessian) if rule.fit in CALIBRATED_FITS and isinstance(hessian, torch.Tensor) else get_fit(rule.fit)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            w, kept, options = _pruned(rule, w, hessian)
            solver: Callable[..., QTensor] = get_solver(rule.solver)
            if is_feedback(rule.solver):
                options["refit"] = refit
            q = solver(w, hessian, format, fit, seed=seed, **options)
            if kept is not None and bool((q.dequantize()[~kept] != 0).any()):
                raise no_zeros()
        except BitfoldError as error:
            raise type(error)(error.what, where=name, hint=error.hint) from error
    for warning in said:
        if not issubclass(warning.category, MoreDamping):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return q, tuple(dict.fromkeys(str(s.message) for s in said if issubclass(s.category, MoreDamping)))


def _pruned(
    rule: Rule, w: torch.Tensor, hessian: Moments | None
) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, Any]]:
    """The weight as far as it is pruned beforehand, the mask if there is one by now, options for the solver."""
    sparsity = read_sparsity(rule.prune)
    if sparsity is None:
        return w, None, {}
    if sparsity.kind == "sparsegpt" and hessian is not None:
        return w, None, {"pruner": SparseGPT(sparsity)}
    kept = wanda_mask(w, None if hessian is None else hessian.diagonal(), sparsity)
    if hessian is None or not is_feedback(rule.solver):
        return w * kept, kept, {}
    return w, kept, {"pruner": Fixed(kept)}
