"""Activations in 8 bits: one scale for each token, chosen as the data comes."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes of each row: codes = round(x * 127 / absmax), ties to even.

    A row that holds NaN or infinity gets the scale NaN, so that its output is NaN and not a plausible number.

    Args:
        x: (m, k) floating point.

    Returns:
        codes int8 (m, k) in -127..127, and scale float32 (m, 1) with x ~ codes * scale.
    """
    x = x.float()
    if x.shape[-1] == 0:
        return x.to(torch.int8), x.new_ones(x.shape[0], 1)
    absmax = x.abs().amax(-1, keepdim=True)
    finite = torch.isfinite(absmax)
    # 127 / absmax overflows for rows below 127 / FLT_MAX: such rows count as zero.
    inverse = torch.where(finite & (absmax > 1e-36), 127.0 / absmax, 0.0)
    codes = (torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0) * inverse).round().to(torch.int8)
    return codes, torch.where(finite, absmax / 127.0, torch.nan)
