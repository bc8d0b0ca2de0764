"""One weight, quantized: format, method and fit by name."""

from __future__ import annotations

import torch

from bitfold.errors import FormatError, UsageError, WeightError
from bitfold.formats import AnyFormat, get_format
from bitfold.methods.fits import NamedFit, get_fit
from bitfold.methods.solvers import Solver, get_solver
from bitfold.qtensor import QTensor, stack


def quantize_tensor(
    w: torch.Tensor,
    format: str | AnyFormat,
    *,
    method: str | Solver = "rtn",
    fit: str | NamedFit = "absmax",
    hessian: torch.Tensor | None = None,
    seed: int = 0,
) -> QTensor:
    """Quantize one weight.

    Args:
        w: (n, k), or (experts, n, k) quantized expert by expert; any float dtype, k is the input dimension.
        format: name or object, see `FORMATS`.
        method: chooses the codes: a name (or an object) of `SOLVERS`, in the basis that the weight is in.
        fit: chooses the scales: a name (or an object) of `FITS`.
        hessian: (k, k) float, second moment of the inputs, for methods that use it.
        seed: for methods that draw random numbers.

    Raises:
        FormatError: unknown format, or one that cannot hold this shape.
        UsageError: unknown method or fit, or a weight that is not a float matrix.
        WeightError: NaN or infinity among the weights, or no weights at all.
    """
    chosen, solve, choose = get_format(format), get_solver(method), get_fit(fit)
    check_weight(w)
    check_block(tuple(w.shape), chosen)
    if w.dim() == 3:
        return stack([solve(part, hessian, chosen, choose, seed=seed) for part in w])
    return solve(w, hessian, chosen, choose, seed=seed)


def check_weight(w: torch.Tensor) -> None:
    """Raise unless w is a finite, non-empty float matrix or stack of matrices."""
    if not w.is_floating_point() or w.dim() not in (2, 3):
        raise UsageError(f"a weight is a float matrix (n, k) or a stack of them, not {w.dtype} {tuple(w.shape)}")
    if w.numel() == 0:
        raise WeightError(f"there are no weights in a tensor of shape {tuple(w.shape)}")
    # The sum of |w| is NaN or infinite if any weight is; a long sum of finite numbers may overflow, so look again.
    if not torch.isfinite(w.abs().sum(dtype=torch.float32)) and not all(torch.isfinite(r).all() for r in w):
        raise WeightError("NaN or infinity among the weights", hint="the checkpoint is damaged; fetch it again")


def check_block(shape: tuple[int, ...], format: AnyFormat) -> None:
    """Raise when the groups of the format are longer than the rows of the weight."""
    group = format.scale.block[1] if format.scale is not None else 0
    if group > shape[-1]:
        raise FormatError(
            f"groups of {group} ({format.name}) are longer than the rows, which have {shape[-1]} weights",
            hint=f"choose a group size of at most {shape[-1]}, or one scale a row",
        )
