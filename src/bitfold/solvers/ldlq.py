"""LDLQ: rounding with error feedback under the Hessian of the inputs.

The loss of a linear layer is tr((W - Q) H (W - Q)^T), H = E[x x^T]. Columns are coded from left to right; the error of
each block is moved onto the columns that follow, where it does the least harm: with H^-1 = U^T U (U upper triangular),
W[:, rest] -= (W - Q)[:, block] U[block, block]^-1 U[block, rest]. GPTQ (Frantar et al. 2022) in blocks; the same as
LDLQ (Chee et al. 2023, QuIP). A trellis codes its blocks of 4 columns jointly.
"""

from __future__ import annotations

import torch

from bitfold.errors import FormatError, WeightError
from bitfold.formats import AnyFormat, Fit
from bitfold.formats.columns import Coder
from bitfold.qtensor import QTensor
from bitfold.solvers.rtn import fit_by_rows

_OUTER = 128  # columns coded before their error reaches the rest in one matrix product
DAMP = 0.01  # of the mean diagonal


def ldlq(
    w: torch.Tensor, hessian: torch.Tensor | None, format: AnyFormat, fit: Fit, *, seed: int = 0, damp: float = DAMP
) -> QTensor:
    """Code the columns of w one block after the other, errors fed forward.

    Args:
        w: (n, k), any float dtype.
        hessian: (k, k), second moment of the inputs; None = identity, which is rounding to nearest.
        format: any format that codes by columns.
        fit: chooses the scales beforehand (static groups).
        seed: not used: nothing is drawn.
        damp: added to the diagonal, as a share of its mean; doubled until the matrix can be inverted.

    Raises:
        FormatError: the format has no column coder.
        WeightError: the Hessian is not finite, or singular whatever the damping.
    """
    start = getattr(format, "coder", None)
    if start is None:
        raise FormatError(f"{format.name} cannot be coded column by column", hint="use the solver rtn")
    work = w.detach().float().clone()
    factor, dead = _factor(hessian, work.shape[1], damp)
    work[:, dead] = 0
    params = fit_by_rows(work, format, fit) if format.scale is not None else None
    coder = start(work, params)
    decoded = torch.empty_like(work)
    for left in range(0, work.shape[1], _OUTER):
        _code_block(work, decoded, coder, factor, slice(left, min(left + _OUTER, work.shape[1])))
    fields = coder.fields()
    if hessian is not None and hasattr(format, "rescaled"):
        fields = format.rescaled(fields, _best_scale(w.detach().float(), decoded, hessian))
    return QTensor(format, tuple(w.shape), fields)


def _code_block(work: torch.Tensor, decoded: torch.Tensor, coder: Coder, factor: torch.Tensor, block: slice) -> None:
    """Columns of an outer block step by step, then their error onto everything to the right in one product."""
    errors = torch.zeros(work.shape[0], block.stop - block.start)
    for at in range(block.start, block.stop, coder.step):
        part = slice(at, min(at + coder.step, block.stop))
        decoded[:, part] = coder.encode(work[:, part], at)
        diagonal = factor[part, part]
        error = torch.linalg.solve_triangular(diagonal, work[:, part] - decoded[:, part], upper=True, left=False)
        errors[:, part.start - block.start : part.stop - block.start] = error
        work[:, part.stop : block.stop] -= error @ factor[part, part.stop : block.stop]
    work[:, block.stop :] -= errors @ factor[block, block.stop :]


def _factor(hessian: torch.Tensor | None, k: int, damp: float) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 U with H^-1 = U^T U, and which inputs are always zero (their weights do not matter)."""
    if hessian is None:
        return torch.eye(k), torch.zeros(k, dtype=torch.bool)
    h = hessian.double().clone()
    if h.shape != (k, k) or not torch.isfinite(h).all():
        raise WeightError(f"the Hessian is {tuple(h.shape)} or not finite; {(k, k)} is needed")
    diagonal = h.diagonal()
    dead = diagonal <= 0
    diagonal[dead] = 1.0
    mean = float(diagonal.mean())
    for attempt in range(12):
        damped = h + torch.eye(k, dtype=h.dtype) * (damp * 2**attempt * mean)
        lower, bad = torch.linalg.cholesky_ex(damped)
        if not bad:
            upper, bad = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bad:
                return upper.float(), dead
    raise WeightError("the Hessian is singular whatever the damping", hint="calibrate with more text")


def _best_scale(w: torch.Tensor, q: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """(n, 1): for each row the factor on q with the least loss, (q H w) / (q H q)."""
    turned = q @ hessian.float()
    top, bottom = (turned * w).sum(1), (turned * q).sum(1)
    factor = torch.where(bottom > 0, top / bottom.clamp_min(1e-30), 1.0)
    # A row that the codes miss altogether must not be turned round or blown up.
    return factor.clamp(0.5, 2.0)[:, None]


def proxy_loss(w: torch.Tensor, q: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr((w - q) H (w - q)^T) / tr(w H w^T): the relative error of the layer's output."""
    h, difference = hessian.double(), (w - q).double()
    whole = float(((w.double() @ h) * w.double()).sum())
    return float(((difference @ h) * difference).sum()) / whole if whole > 0 else 0.0
