"""LDLQ: rounding with error feedback under the Hessian of the inputs.

The loss of a linear layer is tr((W - Q) H (W - Q)^T), H = E[x x^T]. With H = R R^T, R upper triangular, it is the sum
of the squares of (W - Q) R, and column c of that product knows only the errors of the columns up to c. So the columns
are coded from left to right, each aiming at W_c + (errors so far) R[:, c] / R[c, c], which cancels what the columns
before it have left there. LDLQ (Chee et al. 2023, QuIP); the same numbers as GPTQ (Frantar et al. 2022), whose factor
is the inverse of this one. A trellis codes its blocks of 4 columns jointly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from bitfold.errors import FormatError, WeightError
from bitfold.formats import AnyFormat, Fit
from bitfold.formats.columns import Coder
from bitfold.qtensor import QTensor
from bitfold.solvers.pruning import Pruner
from bitfold.solvers.rtn import fit_by_rows

DAMP = 0.01  # of the mean diagonal
_ROWS = 256  # of a matrix turned at a time
_ATTEMPTS = 12  # doublings of the damping before a Hessian is given up


class MoreDamping(UserWarning):
    """A Hessian took more damping than was asked for."""


def ldlq(
    w: torch.Tensor,
    hessian: torch.Tensor | None,
    format: AnyFormat,
    fit: Fit,
    *,
    seed: int = 0,
    damp: float = DAMP,
    by_energy: bool = False,
    pruner: Pruner | None = None,
) -> QTensor:
    """Code the columns of w one block after the other, errors fed forward.

    Args:
        w: (n, k), any float dtype.
        hessian: (k, k), second moment of the inputs; None = identity, which is rounding to nearest.
        format: any format that codes by columns.
        fit: chooses the scales beforehand (static groups).
        seed: not used: nothing is drawn.
        damp: added to the diagonal, as a share of its mean; doubled until the matrix can be factored.
        by_energy: take the blocks of columns with the largest diagonal first (GPTQ's activation order), instead of from
            left to right. Scales stay with their columns.
        pruner: chooses weights that become zero on the way; needs a Hessian.

    Raises:
        FormatError: the format has no column coder, or cannot hold the zeros of the pruner.
        WeightError: the Hessian is not finite, or singular whatever the damping.
    """
    start = getattr(format, "coder", None)
    if start is None:
        raise FormatError(f"{format.name} cannot be coded column by column", hint="use the solver rtn")
    w = w.detach().float()
    if hessian is None:
        coder, decoded = _begin(w, format, fit, start), torch.empty_like(w)
        for at in range(0, w.shape[1], coder.step):
            decoded[:, at : at + coder.step] = coder.encode(w[:, at : at + coder.step], at)
        return QTensor(format, tuple(w.shape), coder.fields())
    dead = _check(hessian, w.shape[1])
    alive = torch.where(dead, 0.0, w) if dead.any() else w
    coder = _begin(alive, format, fit, start)
    grain = coder.step if pruner is None else max(coder.step, pruner.group)
    order = _order(hessian, grain) if by_energy else torch.arange(w.shape[1])
    upper = factor(hessian[order][:, order] if by_energy else hessian, damp)
    feedback = _Feedback(alive, upper, coder, order)
    del upper  # the feedback has its own copy
    feedback.run(0, w.shape[1], pruner)
    fields = coder.fields()
    if hasattr(format, "rescaled"):
        fields = format.rescaled(fields, _best_scale(w, feedback.decoded(), hessian))
    return QTensor(format, tuple(w.shape), fields)


def gptq(
    w: torch.Tensor,
    hessian: torch.Tensor | None,
    format: AnyFormat,
    fit: Fit,
    *,
    seed: int = 0,
    damp: float = DAMP,
    pruner: Pruner | None = None,
) -> QTensor:
    """`ldlq` in GPTQ's activation order: the columns of the largest inputs first, scales chosen beforehand."""
    return ldlq(w, hessian, format, fit, seed=seed, damp=damp, by_energy=True, pruner=pruner)


def _begin(w: torch.Tensor, format: AnyFormat, fit: Fit, start: Callable[..., Coder]) -> Coder:
    return start(w, fit_by_rows(w, format, fit) if format.scale is not None else None)


class _Feedback:
    """Columns coded in a given order, the errors of each half of a range carried to its other half in one product.

    Everything is kept transposed, (k, n): the columns of the weight are then contiguous.
    """

    def __init__(self, w: torch.Tensor, upper: torch.Tensor, coder: Coder, order: torch.Tensor) -> None:
        self._order, self._coder = order, coder
        self._target = w.T[order].contiguous()
        self._lower = upper.T.contiguous()  # R^T
        self._error = torch.zeros_like(self._target)  # (W - Q)^T
        self._carried = torch.zeros_like(self._target)  # what the errors so far leave in each column of (W - Q) R
        self._decoded = torch.empty_like(self._target)
        self._inverse = _diagonal_inverses(self._lower, coder.step)
        self._kept: torch.Tensor | None = None

    def run(self, left: int, right: int, pruner: Pruner | None = None) -> None:
        """Code the columns of a range, whatever was before it carried already."""
        step = self._coder.step
        if pruner is not None and right - left <= max(pruner.span, step):
            self._prune(slice(left, right), pruner)
            pruner = None
        if right - left <= step:
            self._code(slice(left, right))
            return
        grain = step if pruner is None else max(step, pruner.group)
        middle = left + (right - left + grain) // (2 * grain) * grain
        self.run(left, middle, pruner)
        self._carried[middle:right].addmm_(self._lower[middle:right, left:middle], self._error[left:middle])
        self.run(middle, right, pruner)

    def _prune(self, part: slice, pruner: Pruner) -> None:
        """Choose the zeros of some columns by what these should be by now."""
        pivots = self._lower.diagonal()[part]
        aim = (self._target[part] + self._carried[part] / pivots[:, None]).T
        if self._kept is None:
            self._kept = torch.ones_like(self._target, dtype=torch.bool)
        self._kept[part] = pruner.mask(self._order[part], aim, pivots).T

    def _code(self, part: slice) -> None:
        aim = self._target[part] + self._inverse[part.start] @ self._carried[part]
        if self._kept is not None:
            aim = aim * self._kept[part]
        found = self._coder.encode(aim.T, int(self._order[part.start])).T
        if self._kept is not None and bool((found[~self._kept[part]] != 0).any()):
            raise no_zeros()
        self._decoded[part] = found
        self._error[part] = self._target[part] - found

    def decoded(self) -> torch.Tensor:
        """(n, k), the columns in their own places."""
        back = torch.empty_like(self._decoded)
        back[self._order] = self._decoded
        return back.T.contiguous()


def _diagonal_inverses(lower: torch.Tensor, step: int) -> dict[int, torch.Tensor]:
    """Inverses of the blocks on the diagonal, by the column at which each begins."""
    return {at: torch.linalg.inv(lower[at : at + step, at : at + step]) for at in range(0, len(lower), step)}


def _check(hessian: torch.Tensor, k: int) -> torch.Tensor:
    """Which inputs are always zero; their weights do not matter."""
    if hessian.shape != (k, k) or not torch.isfinite(hessian).all():
        raise WeightError(f"the Hessian is {tuple(hessian.shape)} or not finite; {(k, k)} is needed")
    return hessian.diagonal() <= 0


def _order(hessian: torch.Tensor, step: int) -> torch.Tensor:
    """Columns in blocks of `step`, the blocks of most energy first; a last one that is not full stays last."""
    k = len(hessian)
    whole = k // step * step
    energy = hessian.diagonal()[:whole].view(-1, step).sum(1)
    blocks = torch.argsort(energy, descending=True, stable=True)
    columns = (blocks[:, None] * step + torch.arange(step)).flatten()
    return torch.cat([columns, torch.arange(whole, k)])


def factor(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """float32 (k, k) upper triangular R with R R^T = H + damping.

    Raises:
        WeightError: singular whatever the damping.
    """
    for attempt in range(_ATTEMPTS):
        reverse = _reversed(hessian, torch.float64)  # its Cholesky factor, reversed again, is upper
        diagonal = reverse.diagonal()
        diagonal[diagonal <= 0] = 1.0
        diagonal += damp * 2**attempt * float(diagonal.mean())
        lower, bad = reverse.mT, torch.zeros((), dtype=torch.int32)
        torch.linalg.cholesky_ex(lower, out=(lower, bad))  # in place: columns lie together, as LAPACK wants them
        if not bad:
            if attempt:
                more = f"a singular Hessian: damping {damp * 2**attempt:g} instead of {damp:g}"
                warnings.warn(more, MoreDamping, stacklevel=3)
            return _reversed(lower, torch.float32)
    raise WeightError("the Hessian is singular whatever the damping", hint="calibrate with more text")


def no_zeros() -> FormatError:
    """The error for pruned weights that come back as something else."""
    hint = "integers, fp8, nf4 and bf16 can; trellis and lattice codes cannot"
    return FormatError("pruned weights cannot be stored: the format has no zero there", hint=hint)


def _reversed(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows and columns in reverse order, in a new matrix; without another one in between."""
    k = len(matrix)
    out = torch.empty(k, k, dtype=dtype)
    for at in range(0, k, _ROWS):
        stop = min(at + _ROWS, k)
        out[at:stop] = matrix[k - stop : k - at].flip(0, 1)
    return out


def _best_scale(w: torch.Tensor, q: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """(n, 1): for each row the factor on q with the least loss, (q H w) / (q H q)."""
    turned = q @ hessian.float()
    top, bottom = (turned * w).sum(1), (turned * q).sum(1)
    factor = torch.where(bottom > 0, top / bottom.clamp_min(1e-30), 1.0)
    # A row that the codes miss altogether must not be turned round or blown up.
    return factor.clamp(0.5, 2.0)[:, None]


def proxy_loss(w: torch.Tensor, q: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr((w - q) H (w - q)^T) / tr(w H w^T): the relative error of the layer's output."""
    unit = float(w.abs().max())
    if unit == 0:
        return 0.0
    h, w, difference = hessian.float(), w / unit, (w - q) / unit  # squares of huge weights would leave float32
    whole = float(((w @ h) * w).sum(dtype=torch.float64))
    return float(((difference @ h) * difference).sum(dtype=torch.float64)) / whole if whole > 0 else 0.0
