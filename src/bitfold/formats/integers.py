"""Rounding to consecutive integers: what fits and solvers do a thousand times for each weight.

A weight w becomes the integer nearest to w / scale + zero (ties to even) within a grid, and decodes to
(integer - zero) * scale. In the native core, or in PyTorch with the same sums in the same order: the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bitfold.system import backend, native

AT_ONCE = 64  # columns that `feed` takes: more would leave the caches, fewer would leave too much to small products
_SUMS = 16  # in which the core adds up squares


def available(*tensors: torch.Tensor | None) -> bool:
    """Whether the core is there and these are what it takes: float32 in the memory of the CPU."""
    narrow = all(t is None or t.dtype == torch.float32 for t in tensors)
    return narrow and backend.core_for(*tensors) is not None


def block_errors(
    w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, span: tuple[float, float]
) -> torch.Tensor:
    """Mean square error of each block of weights, by the core, which must be `available`.

    Args:
        w: float32 (..., length).
        scale: float32 (...).
        zero: float32 (...), or None.
        span: first and last integer.
    """
    w, scale = w.contiguous(), scale.contiguous()
    zero = None if zero is None else zero.contiguous()
    error = torch.empty_like(scale)
    addresses = (scale.data_ptr(), _address(zero), error.data_ptr())
    core = native.core()
    assert core is not None
    core.rounding_errors(core.Integers(*span), w.data_ptr(), scale.numel(), w.shape[-1], *addresses, native.threads())
    return error


def mean_square(x: torch.Tensor) -> torch.Tensor:
    """Of the last axis of x, which is overwritten: the sums that `block_errors` makes, in the same order."""
    length = x.shape[-1]
    squares = torch.nn.functional.pad(x.square_(), (0, -length % _SUMS))
    sums = torch.zeros_like(squares[..., :_SUMS])
    for part in torch.split(squares, _SUMS, -1):
        sums += part
    while sums.shape[-1] > 1:
        low, high = sums.chunk(2, -1)
        sums = low + high
    return sums[..., 0] / length


@dataclass(frozen=True)
class Scales:
    """What columns are rounded with.

    Args:
        span: first and last integer.
        group: columns that share a scale.
        scale: float32 (groups, n), contiguous.
        zero: the same, or None.
    """

    span: tuple[float, float]
    group: int
    scale: torch.Tensor
    zero: torch.Tensor | None


@dataclass(frozen=True)
class FeedbackColumns:
    """Neighbouring columns on their way through error feedback, transposed and contiguous.

    Args:
        places: int64 (c,), the number of each in the weight; c is at most `AT_ONCE`.
        lower: float32 (c, c): in row j what the errors of the columns before leave in column j, and its pivot.
        target: float32 (c, n).
        carried: float32 (c, n), what columns before these have left.
        kept: bool (c, n), False where zeros are to be; or None.
        decoded: float32 (c, n), written.
        error: float32 (c, n), target - decoded, written.
    """

    places: torch.Tensor
    lower: torch.Tensor
    target: torch.Tensor
    carried: torch.Tensor
    kept: torch.Tensor | None
    decoded: torch.Tensor
    error: torch.Tensor


def feed(columns: FeedbackColumns, scales: Scales, codes: torch.Tensor) -> None:
    """Code the columns one after the other, each aiming at target + (carried + lower error) / pivot.

    Args:
        columns: which.
        scales: of the whole weight.
        codes: uint8 (k, n), contiguous: integer - span[0], written at the places.
    """
    c = columns
    if not available(c.target, c.carried, scales.scale, scales.zero):
        _feed(columns, scales, codes)
        return
    lower, places = c.lower.contiguous(), c.places.contiguous()
    core = native.core()
    assert core is not None
    native_scales = core.ColumnScales(group=scales.group, scale=scales.scale.data_ptr(), zero=_address(scales.zero))
    native_columns = core.Columns(
        count=len(places),
        rows=c.target.shape[1],
        lower=lower.data_ptr(),
        stride=lower.stride(0),
        target=c.target.data_ptr(),
        carried=c.carried.data_ptr(),
        places=places.data_ptr(),
        kept=_address(c.kept),
        decoded=c.decoded.data_ptr(),
        error=c.error.data_ptr(),
    )
    core.rounding_feedback(
        core.Integers(*scales.span), native_scales, native_columns, codes.data_ptr(), native.threads()
    )


def _feed(columns: FeedbackColumns, scales: Scales, codes: torch.Tensor) -> None:
    """`feed` in PyTorch: each error goes to all later columns at once, so that sums grow in the order of the core's."""
    c, low = columns, scales.span[0]
    carried, pivots = c.carried.clone(), 1 / c.lower.diagonal()
    for j, place in enumerate(c.places.tolist()):
        aim = c.target[j] + carried[j] * pivots[j]
        if c.kept is not None:
            aim = torch.where(c.kept[j], aim, 0.0)
        scale = scales.scale[place // scales.group]
        shift = 0.0 if scales.zero is None else scales.zero[place // scales.group]
        integer = (aim * torch.where(scale == 0, 0.0, 1 / scale) + shift).round_().clamp_(*scales.span)
        codes[place] = (integer - low).to(torch.uint8)
        c.decoded[j] = (integer - shift) * scale
        torch.sub(c.target[j], c.decoded[j], out=c.error[j])
        carried[j + 1 :] += c.lower[j + 1 :, j : j + 1] * c.error[j]


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
