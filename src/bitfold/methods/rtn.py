"""Round to nearest: each weight by itself."""

from __future__ import annotations

import torch

from bitfold.formats import AnyFormat, Fit, Params
from bitfold.methods.fits import FITS
from bitfold.qtensor import QTensor
from bitfold.system import backend
from bitfold.system.parallel import parallel_map

_BYTES = 64  # of temporaries for each weight that is fitted on an accelerator
_CHUNK = 1 << 17  # elements fitted at a time: temporaries stay in the second-level cache, small steps weigh little


def rtn(w: torch.Tensor, hessian: torch.Tensor | None, format: AnyFormat, fit: Fit, *, seed: int = 0) -> QTensor:
    """Fit the scales, then take the nearest code of every weight.

    Args:
        w: (n, k), any float dtype.
        hessian: not used.
        format: any format that can encode.
        fit: chooses the scales; formats that choose their own search for them unless it is "absmax": that is what their
            own program does in a formula, bit for bit.
        seed: not used: rounding to nearest draws nothing.
    """
    shape = tuple(w.shape)
    if format.scale is None:
        if format.weighted is not None and fit is not FITS["absmax"]:
            return QTensor(format, shape, format.weighted(w, None))
        return QTensor(format, shape, format.encode(w, None))
    return QTensor(format, shape, format.encode(w, fit_by_rows(w, format, fit)))


def fit_by_rows(w: torch.Tensor, format: AnyFormat, fit: Fit) -> Params:
    """Blocks of different rows do not know each other: fit a few rows at a time to keep temporaries small."""
    assert format.scale is not None
    n, k = w.shape
    rows = format.scale.block[0]
    away = w.device.type != "cpu"
    count = backend.scratch(w.device) // _BYTES if away else _CHUNK
    if rows == 0 or w.numel() <= count:
        return fit(w, format, None)
    step = max(1, count // k // rows) * rows
    starts = range(0, n, step)
    some = [fit(w[i : i + step], format, None) for i in starts] if away else None
    parts = some or parallel_map(lambda i: fit(w[i : i + step], format, None), starts)
    zeros = [p.zero_point for p in parts if p.zero_point is not None]
    return Params(torch.cat([p.scale for p in parts]), torch.cat(zeros) if zeros else None)
