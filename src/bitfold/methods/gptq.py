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
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bitfold.errors import FormatError, WeightError
from bitfold.formats import AnyFormat, Fit
from bitfold.formats.columns import Coder
from bitfold.formats.integers import FeedbackColumns
from bitfold.methods.hessian import Moments, diagonal_blocks, product, product_columns
from bitfold.methods.pruning import Pruner
from bitfold.methods.rtn import fit_by_rows
from bitfold.qtensor import QTensor, row_ranges

DAMP = 0.01  # of the mean diagonal
_ROWS = 256  # of a matrix turned at a time
WEIGHTS = 1 << 24  # coded at a time
_SQUARE = 1024  # columns of a Hessian whose products are made at a time
_ATTEMPTS = 12  # doublings of the damping before a Hessian is given up


class MoreDamping(UserWarning):
    """A Hessian took more damping than was asked for."""


def ldlq(
    w: torch.Tensor,
    hessian: Moments | None,
    format: AnyFormat,
    fit: Fit,
    *,
    seed: int = 0,
    damp: float = DAMP,
    by_energy: bool = False,
    refit: bool = True,
    pruner: Pruner | None = None,
) -> QTensor:
    """Code the columns of w one block after the other, errors fed forward.

    Args:
        w: (n, k), any float dtype.
        hessian: (k, k) float32, second moment of the inputs; `BlockDiagonal` of it, whose columns are then coded
            without regard for those of the others; None = identity, which is rounding to nearest.
        format: any format that codes by columns.
        fit: chooses the scales beforehand (static groups).
        seed: not used: nothing is drawn.
        damp: added to the diagonal, as a share of its mean; doubled until the matrix can be factored.
        by_energy: take the blocks of columns with the largest diagonal first (GPTQ's activation order), instead of from
            left to right. Scales stay with their columns.
        refit: at the end, multiply each row by the number that costs least under the Hessian, where the format can.
        pruner: chooses weights that become zero on the way; needs a Hessian.

    Raises:
        FormatError: the format has no column coder, or cannot hold the zeros of the pruner.
        WeightError: the Hessian is not finite, or singular whatever the damping.
    """
    start = format.coder
    if start is None:
        raise FormatError(f"{format.name} cannot be coded column by column", hint="use --method rtn, or another format")
    w = w.detach().float()
    if hessian is None:
        return _without_data(w, format, fit, start)
    dead = _check(hessian, w.shape[1])
    alive = torch.where(dead, 0.0, w) if dead.any() else w
    pieces = [slice(0, len(w))] if pruner is not None else row_pieces(format, w)
    factors: list[_Factor] = []
    found = []
    for rows in pieces:  # rows do not know each other: memory holds the errors of some at a time
        coder = _begin(alive[rows], format, fit, start, hessian.diagonal().float())
        grain = coder.step if pruner is None else max(coder.step, pruner.group)
        step = 0 if coder.at_once else coder.step
        factors = factors or [_factored(c, h, damp, step, grain * by_energy) for c, h in diagonal_blocks(hessian)]
        decoded = _coded(alive[rows], factors, coder, pruner)
        if refit and coder.refit is not None and pruner is None:
            coder.refit(alive[rows], partial(_times, hessian))
        fields = coder.fields()
        if refit and format.rescaled is not None:
            fields = format.rescaled(fields, _best_scale(w[rows], decoded, hessian))
        found.append(fields)
    fields = found[0] if len(found) == 1 else {name: torch.cat([f[name] for f in found]) for name in found[0]}
    return QTensor(format, tuple(w.shape), fields)


def _without_data(w: torch.Tensor, format: AnyFormat, fit: Fit, start: Callable[..., Coder]) -> QTensor:
    """No column knows of another: rounding to nearest."""
    if format.weighted is not None:  # its blocks choose their scales by themselves
        return QTensor(format, tuple(w.shape), format.weighted(w, None))
    coder = _begin(w, format, fit, start, None)
    step = coder.at_once or coder.step
    for at in range(0, w.shape[1], step):
        coder.encode(w[:, at : at + step], at)
    return QTensor(format, tuple(w.shape), coder.fields())


def gptq(
    w: torch.Tensor,
    hessian: Moments | None,
    format: AnyFormat,
    fit: Fit,
    *,
    seed: int = 0,
    damp: float = DAMP,
    refit: bool = True,
    pruner: Pruner | None = None,
) -> QTensor:
    """`ldlq` in GPTQ's activation order: the columns of the largest inputs first, scales chosen beforehand."""
    return ldlq(w, hessian, format, fit, seed=seed, damp=damp, by_energy=True, refit=refit, pruner=pruner)


def _begin(
    w: torch.Tensor, format: AnyFormat, fit: Fit, start: Callable[..., Coder], importance: torch.Tensor | None
) -> Coder:
    return start(w, fit_by_rows(w, format, fit) if format.scale is not None else None, importance)


def _times(hessian: Moments, x: torch.Tensor, columns: slice) -> torch.Tensor:
    return product_columns(x, hessian, columns)


@dataclass(frozen=True)
class _Factor:
    """What is needed to code some columns.

    Args:
        order: their numbers in the order in which they are coded.
        lower: (c, c) R^T of that order.
        inverses: see `_diagonal_inverses`; none for coders that feed errors forward by themselves.
    """

    order: torch.Tensor
    lower: torch.Tensor
    inverses: dict[int, torch.Tensor]


def _factored(columns: slice, hessian: torch.Tensor, damp: float, step: int, grain: int) -> _Factor:
    """The factor of a part of the Hessian.

    step: columns of a block on the diagonal to be inverted, 0 = none. grain: those that activation order moves
    together, 0 = from left to right.
    """
    order = _order(hessian, grain) if grain else None
    lower = factor(hessian, damp, order).T
    places = torch.arange(len(hessian), device=hessian.device) if order is None else order
    return _Factor(places + columns.start, lower, _diagonal_inverses(lower, step) if step else {})


def _coded(w: torch.Tensor, factors: list[_Factor], coder: Coder, pruner: Pruner | None) -> torch.Tensor:
    """Code all columns; returns what they decode to, (n, k)."""
    decoded = torch.empty_like(w)
    for factor in factors:
        feedback = _Feedback(w, factor, coder)
        feedback.run(0, len(factor.order), pruner)
        decoded[:, factor.order] = feedback.decoded.T
    return decoded


class _Feedback:
    """Columns coded in a given order, the errors of each half of a range carried to its other half in one product.

    Everything is kept transposed, (k, n): the columns of the weight are then contiguous.
    """

    def __init__(self, w: torch.Tensor, factor: _Factor, coder: Any) -> None:
        self._order, self._lower, self._inverse = factor.order, factor.lower, factor.inverses
        self._places: list[int] = factor.order.tolist()  # asked for once: an accelerator is waited for each time
        self._coder = coder
        self._target = w.T[factor.order].contiguous()
        self._error = torch.zeros_like(self._target)  # (W - Q)^T
        self._carried = torch.zeros_like(self._target)  # what the errors so far leave in each column of (W - Q) R
        self.decoded = torch.empty_like(self._target)
        self._kept: torch.Tensor | None = None

    def run(self, left: int, right: int, pruner: Pruner | None = None) -> None:
        """Code the columns of a range, whatever was before it carried already."""
        step = self._coder.step
        if pruner is not None and right - left <= max(pruner.span, step):
            self._prune(slice(left, right), pruner)
            pruner = None
        if pruner is None and right - left <= self._coder.at_once:
            self._feed(slice(left, right))
            return
        if right - left <= step:
            self._code(slice(left, right))
            return
        grain = max(step, self._coder.at_once if pruner is None else pruner.group)
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

    def _feed(self, part: slice) -> None:
        kept = None if self._kept is None else self._kept[part]
        target, carried, decoded, error = (t[part] for t in (self._target, self._carried, self.decoded, self._error))
        feed = self._coder.feed
        assert feed is not None  # at_once is not 0
        feed(FeedbackColumns(self._order[part], self._lower[part, part], target, carried, kept, decoded, error))
        if kept is not None and bool((decoded[~kept] != 0).any()):
            raise no_zeros()

    def _code(self, part: slice) -> None:
        aim = torch.addmm(self._target[part], self._inverse[part.start], self._carried[part])
        if self._kept is not None:
            aim = aim * self._kept[part]
        start, under = self._places[part.start], self._coder.under
        if under is None:
            found = self._coder.encode(aim.T, start).T
        else:
            pivots = self._lower[part, part]
            found = under(aim.T, start, pivots.T @ pivots).T
        if self._kept is not None and bool((found[~self._kept[part]] != 0).any()):
            raise no_zeros()
        self.decoded[part] = found
        torch.sub(self._target[part], found, out=self._error[part])


def _diagonal_inverses(lower: torch.Tensor, step: int) -> dict[int, torch.Tensor]:
    """Inverses of the blocks on the diagonal, by the column at which each begins."""
    whole = len(lower) // step
    along, down, across = (lower.stride(0) + lower.stride(1)) * step, *lower.stride()
    blocks = torch.linalg.inv(lower.as_strided((whole, step, step), (along, down, across), lower.storage_offset()))
    found = {at * step: block for at, block in enumerate(blocks)}
    if whole * step < len(lower):
        found[whole * step] = torch.linalg.inv(lower[whole * step :, whole * step :])
    return found


def _check(hessian: Moments, k: int) -> torch.Tensor:
    """Which inputs are always zero; their weights do not matter."""
    for _, part in diagonal_blocks(hessian):
        if part.dim() != 2 or part.shape[0] != part.shape[1] or not torch.isfinite(part).all():
            raise WeightError(f"the Hessian is {tuple(part.shape)} or not finite; {(k, k)} is needed")
    if len(hessian) != k:
        raise WeightError(f"the Hessian is of {len(hessian)} inputs; {k} are needed")
    return hessian.diagonal() <= 0


def _order(hessian: torch.Tensor, step: int) -> torch.Tensor:
    """Columns in blocks of `step`, the blocks of most energy first; a last one that is not full stays last."""
    k = len(hessian)
    whole = k // step * step
    energy = hessian.diagonal()[:whole].view(-1, step).sum(1)
    blocks = torch.argsort(energy, descending=True, stable=True)
    columns = (blocks[:, None] * step + torch.arange(step, device=blocks.device)).flatten()
    return torch.cat([columns, torch.arange(whole, k, device=blocks.device)])


def factor(hessian: torch.Tensor, damp: float, order: torch.Tensor | None = None) -> torch.Tensor:
    """float32 (k, k) upper triangular R with R R^T = H + damping, rows and columns of H taken in that order.

    Raises:
        WeightError: singular whatever the damping.
    """
    for attempt in range(_ATTEMPTS):
        lower = _cholesky(hessian, damp * 2**attempt, order)
        if lower is not None:
            if attempt:
                more = f"a singular Hessian: damping {damp * 2**attempt:g} instead of {damp:g}"
                warnings.warn(more, MoreDamping, stacklevel=3)
            return _reversed(lower, torch.float32)
    raise WeightError("the Hessian is singular whatever the damping", hint="calibrate with more text")


def _cholesky(hessian: torch.Tensor, damp: float, order: torch.Tensor | None) -> torch.Tensor | None:
    """float64 lower triangular factor of H with rows and columns in reverse; reversed again, it is upper. Or None."""
    reverse = _reversed(hessian, torch.float64, order)
    diagonal = reverse.diagonal()
    diagonal[diagonal <= 0] = 1.0
    diagonal += damp * float(diagonal.mean())
    lower, bad = reverse.mT, torch.zeros((), dtype=torch.int32, device=hessian.device)
    torch.linalg.cholesky_ex(lower, out=(lower, bad))  # in place: columns lie together, as LAPACK wants them
    return None if bad else lower


def no_zeros() -> FormatError:
    """The error for pruned weights that come back as something else."""
    hint = "integers, fp8, nf4 and bf16 can; trellis and lattice codes cannot"
    return FormatError("pruned weights cannot be stored: the format has no zero there", hint=hint)


def _reversed(matrix: torch.Tensor, dtype: torch.dtype, order: torch.Tensor | None = None) -> torch.Tensor:
    """Rows and columns (in that order) in reverse, in a new matrix; without another one in between."""
    k = len(matrix)
    out = torch.empty(k, k, dtype=dtype, device=matrix.device)
    for at in range(0, k, _ROWS):
        stop = min(at + _ROWS, k)
        rows = slice(k - stop, k - at)
        part = matrix[rows] if order is None else matrix[order[rows]][:, order]
        out[at:stop] = part.flip(0, 1)
    return out


def _best_scale(w: torch.Tensor, q: torch.Tensor, hessian: Moments) -> torch.Tensor:
    """(n, 1): for each row the factor on q with the least loss, (q H w) / (q H q)."""
    turned = product(q, hessian)
    top, bottom = (turned * w).sum(1), (turned * q).sum(1)
    factor = torch.where(bottom > 0, top / bottom.clamp_min(1e-30), 1.0)
    # A row that the codes miss altogether must not be turned round or blown up.
    return factor.clamp(0.5, 2.0)[:, None]


def row_pieces(format: AnyFormat, w: torch.Tensor) -> list[slice]:
    """Rows of w (n, k) that are coded together: memory holds their errors. Those of one piece do not know of another.

    Other pieces round otherwise, so they are the same for everybody who codes some of them: a start that is a multiple
    of the first one's length begins a piece. An accelerator takes as many rows as its memory likes.
    """
    n, k = w.shape
    each = format.rows_at_once if w.device.type == "cpu" else None
    some = WEIGHTS if each is None else min(WEIGHTS, each * torch.get_num_threads() * k)
    return row_ranges(format, (n, k), some)


def proxy_loss(w: torch.Tensor, q: torch.Tensor, hessian: Moments) -> float:
    """tr((w - q) H (w - q)^T) / tr(w H w^T): the relative error of the layer's output. A few rows at a time."""
    step = max(1, WEIGHTS // w.shape[1])
    some = zip(torch.split(w, step), torch.split(q, step), strict=True)
    lost, whole = torch.stack([row_losses(part, codes, hessian).sum(0) for part, codes in some]).sum(0).tolist()
    return lost / whole if whole > 0 else 0.0


def row_losses(w: torch.Tensor, q: torch.Tensor, hessian: Moments) -> torch.Tensor:
    """(n, 2) float64, of each row: (w - q) H (w - q)^T and w H w^T."""
    unit = w.abs().amax(1, keepdim=True)
    unit = torch.where(unit > 0, unit, 1.0)  # squares of huge weights would leave float32
    found = torch.stack([_energy((w - q) / unit, hessian), _energy(w / unit, hessian)], 1)
    return found * unit.double().square()


def _energy(w: torch.Tensor, hessian: Moments) -> torch.Tensor:
    """w H w^T of each row, float64, from the upper half of H: nearly half of the products."""
    total = torch.zeros(len(w), dtype=torch.float64, device=w.device)
    for columns, part in diagonal_blocks(hessian):
        x, h = w[:, columns], part.to(w.dtype)
        for at in range(0, len(h), _SQUARE):
            here = slice(at, at + _SQUARE)
            turned = torch.addmm(x[:, here] @ h[here, here], x[:, :at], h[:at, here], alpha=2)
            total += (turned * x[:, here]).sum(1, dtype=torch.float64)
    return total
