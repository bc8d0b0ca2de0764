"""The kernel that accepts everything: decode some rows, multiply, next rows. Never the whole weight in floating point.

It is the law for the others: with float activations y = x W^T in float32; with int8 activations x is rounded to
`codes * scale` for each token and y = scale * (codes W^T).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitfold.kernels.activations import quantize_tokens
from bitfold.kernels.base import Kernel
from bitfold.qtensor import QTensor

_CHUNK = 1 << 22  # weights decoded at a time: 16 MB of float32


@dataclass(frozen=True)
class _State:
    q: QTensor
    act: str


class _Matmul(torch.autograd.Function):
    """Keeps the quantized weight for the backward pass, not a decoded one; int8 rounding is passed straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, state: _State) -> Tensor:
        ctx.state, ctx.dtype = state, x.dtype
        if state.act == "int8":
            codes, scale = quantize_tokens(x)
            return _times(codes.float(), state.q) * scale
        return _times(x.float(), state.q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        out = torch.zeros(grad.shape[0], ctx.state.q.shape[1], dtype=torch.float32, device=grad.device)
        for rows, w in _row_chunks(ctx.state.q):
            out.addmm_(grad[:, rows].float(), w)
        return out.to(ctx.dtype), None


def _row_chunks(q: QTensor) -> Iterator[tuple[slice, Tensor]]:
    n, k = q.shape
    step = max(1, _CHUNK // max(k, 1))
    if step >= n:
        yield slice(0, n), q.dequantize()
        return
    device = next(iter(q.fields.values())).device
    for at in range(0, n, step):
        rows = torch.arange(at, min(at + step, n), device=device)
        yield slice(at, at + len(rows)), q.rows(rows)


def _times(x: Tensor, q: QTensor) -> Tensor:
    y = torch.empty(x.shape[0], q.shape[0], dtype=torch.float32, device=x.device)
    for rows, w in _row_chunks(q):
        y[:, rows] = x @ w.T
    return y


def _matmul(x: Tensor, state: _State) -> Tensor:
    y: Tensor = _Matmul.apply(x, state)  # type: ignore[no-untyped-call]
    return y


reference = Kernel("reference", accepts=lambda q, act: True, prepack=_State, matmul=_matmul)
