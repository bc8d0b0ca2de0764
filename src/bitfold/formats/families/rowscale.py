"""One bfloat16 scale for each row, for formats whose points are made for normally distributed rows.

bfloat16, because codes are chosen under the rounded scale: its short mantissa costs nothing, and it cannot overflow or
lose tiny rows as float16 does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitfold.errors import FormatError


def store_row_scale(scale: Tensor, name: str) -> Tensor:
    """The scales as they are stored: bfloat16 (n, 1), of any float (n,) or (n, 1).

    Raises:
        FormatError: NaN or infinite; `name` is the format's.
    """
    stored = scale.detach().to(torch.bfloat16).reshape(-1, 1)
    if not torch.isfinite(stored).all():
        raise FormatError(f"a row scale of {name} is not finite in bfloat16")
    return stored


def gaussian_row_scale(w: Tensor, sigma: float, name: str) -> Tensor:
    """bfloat16 (n, 1): root mean square of each row of w (n, k) over sigma, that of the points where they fit best.

    Raises:
        FormatError: a scale that bfloat16 cannot hold.
    """
    top = w.abs().amax(-1, keepdim=True).float()
    unit = torch.where(top == 0, 1.0, top)  # squares of tiny or huge rows would leave float32
    rms = (w / unit).float().square().mean(-1, keepdim=True).sqrt() * top
    return store_row_scale(rms / sigma, name)


def check_rows(scale: Tensor, rows: int, name: str) -> Tensor:
    """The stored scales as float32 (rows, 1); FormatError when there are more or fewer than rows."""
    if len(scale) != rows:
        raise FormatError(f"{name} needs one scale for each of {rows} rows, not {len(scale)}")
    return scale.float()
