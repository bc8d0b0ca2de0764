"""One weight under one scheme: its fit and solver bound to the Hessian, pruned where the scheme says so."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from bitfold.errors import BitfoldError, UsageError
from bitfold.formats import Fit
from bitfold.methods.clip import clip
from bitfold.methods.gptq import MoreDamping, no_zeros
from bitfold.methods.hessian import BlockDiagonal, Moments
from bitfold.methods.pruning import Fixed, SparseGPT, wanda_mask
from bitfold.qtensor import QTensor
from bitfold.recipes.scheme import Scheme

_ONLY = "only gptq and ldlq, with or without a rotation, take inputs in ranges"


def solve(
    scheme: Scheme, w: torch.Tensor, hessian: Moments | None, seed: int, name: str, *, refit: bool = True
) -> tuple[QTensor, tuple[str, ...]]:
    """Quantize (and prune) a weight (n, k), in its basis, under the Hessian (k, k) of its inputs.

    Args:
        scheme: how.
        w: the weight.
        hessian: None = there are no data: fits and solvers that want them do without, pruning goes by magnitude;
            squares of it only for schemes that take ranges.
        seed: of the solver.
        name: for errors.
        refit: whether error feedback ends with a refit of the row scales, see `ldlq`.

    Returns:
        The weight, and what went otherwise than it should, in words.

    Raises:
        BitfoldError: with the name.
    """
    solver = scheme.solver
    if isinstance(hessian, BlockDiagonal) and not scheme.takes_ranges:
        raise UsageError("this method needs the Hessian of all inputs", where=name, hint=_ONLY)
    fit: Fit = clip(hessian) if scheme.fit.needs_hessian and isinstance(hessian, torch.Tensor) else scheme.fit
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            w, kept, options = _pruned(scheme, w, hessian)
            if solver.feeds_errors:
                options["refit"] = refit
            q = solver(w, hessian, scheme.format, fit, seed=seed, **options)
            if kept is not None and bool((q.dequantize()[~kept] != 0).any()):
                raise no_zeros()
        except BitfoldError as error:
            raise type(error)(error.what, where=name, hint=error.hint) from error
    for warning in said:
        if not issubclass(warning.category, MoreDamping):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return q, tuple(dict.fromkeys(str(s.message) for s in said if issubclass(s.category, MoreDamping)))


def _pruned(
    scheme: Scheme, w: torch.Tensor, hessian: Moments | None
) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, Any]]:
    """The weight as far as it is pruned beforehand, the mask if there is one by now, options for the solver."""
    sparsity = scheme.sparsity
    if sparsity is None:
        return w, None, {}
    if sparsity.on_the_way and hessian is not None:
        return w, None, {"pruner": SparseGPT(sparsity)}
    kept = wanda_mask(w, None if hessian is None else hessian.diagonal(), sparsity)
    if hessian is None or not scheme.solver.feeds_errors:
        return w * kept, kept, {}
    return w, kept, {"pruner": Fixed(kept)}
