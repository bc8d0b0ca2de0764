"""The output head, solved last: under what the quantized blocks hand on to it, some of its rows at a time.

A head is as large as all the blocks of a small model and, tied to it, the embedding as well. Its rows do not know each
other, so memory holds the weight as it is stored and the errors of some rows. What it loses as an embedding goes by the
plain size of the errors, which a strong damping keeps small (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bitfold.calibration.fallback import Fallback, recoverable
from bitfold.calibration.one_layer import solve
from bitfold.calibration.shared_input import Solved, too_few
from bitfold.calibration.statistics import Statistics, Sums, Wanted
from bitfold.calibration.tensors import Reader
from bitfold.calibration.walk import BlockWalk
from bitfold.methods.gptq import proxy_loss
from bitfold.methods.hessian import Moments
from bitfold.planning.decisions import Quantized
from bitfold.planning.row_slices import ranges
from bitfold.qtensor import QTensor, rows_stack
from bitfold.system.backend import CPU


def head_of(model: nn.Module | None, decisions: Iterable[Quantized]) -> Quantized | None:
    """The decision about the weight of the output head, tied to the embedding or not, if it is to be solved here: with
    error feedback, in the model's own basis.

    Args:
        model: the skeleton.
        decisions: of the plan.
    """
    name = _output(model)
    found = (d for d in decisions if name in (d.tensor, *d.site.aliases))
    return next((d for d in found if name is not None and _takes_feedback(d)), None)


def _output(model: Any) -> str | None:
    """Name of its weight."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        head = getter() if callable(getter) else None
    except (AttributeError, NotImplementedError):
        head = None
    if not isinstance(head, nn.Linear):
        return None
    return next((f"{path}.weight" for path, module in model.named_modules() if module is head), None)


def _takes_feedback(decision: Quantized) -> bool:
    scheme = decision.scheme
    plain = scheme.sparsity is None and not scheme.activations.static and not decision.site.transposed
    basis = scheme.transform.changes_basis or scheme.transform.diagonal
    return scheme.solver.feeds_errors and plain and not basis


def solve_head(walk: BlockWalk, reader: Reader, decision: Quantized, seed: int, *, refit: bool) -> Solved | Fallback:
    """The head quantized, after the last block of the last list.

    Args:
        walk: at its end.
        reader: of the model's tensors.
        decision: from `head_of`.
        seed: of the solver.
        refit: see `ldlq`.
    """
    try:
        return _solved(decision, _statistics(walk, decision), reader, seed, refit=refit)
    except Exception as error:
        return Fallback(decision.tensor, "quantized without data", recoverable(error))


@torch.no_grad()
def _statistics(walk: BlockWalk, decision: Quantized) -> Statistics:
    name = _output(walk.model)
    assert name is not None, "head_of has found it"
    sums = Sums(torch.Size(decision.site.qshape), Wanted(cross=False))
    for inputs in walk.ends(name.rpartition(".")[0]):
        sums.add(inputs.reshape(-1, inputs.shape[-1]).float().to(walk.device), None, None)
        sums.close()
    return sums.statistics()


def _solved(decision: Quantized, known: Statistics, reader: Reader, seed: int, *, refit: bool) -> Solved:
    w, hessian, few = reader.read(decision.tensor), known.hessian, too_few(known)
    flags, parts = list(few), list[QTensor]()
    lost, energy = 0.0, 0.0
    for first, stop in _pieces(decision):
        rows = w[first:stop].float().to(hessian.diagonal().device)
        q, odd = solve(decision.scheme, rows, None if few else hessian, seed, decision.tensor, refit=refit)
        whole = _energy(rows, hessian)
        lost, energy = lost + whole * proxy_loss(rows, q.dequantize(), hessian), energy + whole
        parts.append(q.to(CPU))
        flags += odd
    fields = {name: torch.cat([q.fields[name] for q in parts]) for name in parts[0].fields}
    q = QTensor(parts[0].format, decision.site.qshape, fields)
    loss = None if few else lost / energy if energy > 0 else 0.0
    return Solved(decision, q, w, loss, flags=tuple(dict.fromkeys(flags)))


def _energy(w: torch.Tensor, hessian: Moments) -> float:
    assert isinstance(hessian, torch.Tensor)
    return float(((w @ hessian) * w).sum())


def _pieces(decision: Quantized) -> list[tuple[int, int]]:
    n, k = decision.site.qshape
    found = ranges((n, k))
    return found if rows_stack(decision.scheme.format, [(b - a, k) for a, b in found]) else [(0, n)]
