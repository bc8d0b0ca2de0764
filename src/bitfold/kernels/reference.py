"""The kernel that accepts everything: decode some rows, multiply, next rows. Never the whole weight in floating point.

It is the law for the others: with float activations y = x W^T in float32; with int8 activations x is rounded to
`codes * scale` for each token and y = scale * (codes W^T).

On accelerators it is the plain route. Rows are decoded by operations that torch.compile makes one kernel of (where
Triton is), and activations of 16 bits meet weights rounded to their dtype: that is what such devices multiply fast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from bitfold.kernels.activations import quantize_tokens
from bitfold.kernels.base import Kernel
from bitfold.qtensor import QTensor, cut_rows, row_ranges
from bitfold.system import backend

_CHUNK = 1 << 22  # weights decoded at a time: 16 MB of float32
_BYTES = 24  # of temporaries for each weight that an accelerator decodes: two words of 32 bits, floats
_NARROW = (torch.bfloat16, torch.float16)


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
        narrow = x.device.type != "cpu" and x.dtype in _NARROW
        return _times(x if narrow else x.float(), state.q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        out = torch.zeros(grad.shape[0], ctx.state.q.shape[1], dtype=torch.float32, device=grad.device)
        for rows, w in _row_chunks(ctx.state.q, torch.float32):
            out.addmm_(grad[:, rows].float(), w)
        return out.to(ctx.dtype), None


def _row_chunks(q: QTensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Some rows after the other, decoded and rounded to that dtype."""
    n, k = q.shape
    device = next(iter(q.fields.values())).device
    if device.type != "cpu":
        yield from _device_chunks(q, dtype, device)
        return
    step = max(1, _CHUNK // max(k, 1))
    if step >= n:
        yield slice(0, n), q.dequantize(dtype)
        return
    for at in range(0, n, step):
        rows = torch.arange(at, min(at + step, n), device=device)
        yield slice(at, at + len(rows)), q.rows(rows).to(dtype)


def _device_chunks(q: QTensor, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    ranges = row_ranges(q.format, (q.shape[0], q.shape[1]), backend.scratch(device) // _BYTES)
    for rows in ranges:
        part = q if len(ranges) == 1 else cut_rows(q, rows.start, rows.stop)
        if backend.has_triton(device):
            form: Any = q.format  # hashable, as data is
            yield rows, compiled_decoder(form, part.shape, dtype)(dict(part.fields))
        else:
            yield rows, part.dequantize(dtype)


@functools.lru_cache(maxsize=256)
def compiled_decoder(format: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[dict[str, Tensor]], Tensor]:
    """fields -> the weight of that shape and dtype, in one kernel that torch.compile makes."""

    def decode(fields: dict[str, Tensor]) -> Tensor:
        w: Tensor = format.decode(fields, shape).to(dtype)
        return w

    # The compiler counts how often one code is compiled, and gives up after eight: each shape has a code of its own.
    own = FunctionType(decode.__code__.replace(), globals(), "decode", None, decode.__closure__)
    made: Callable[[dict[str, Tensor]], Tensor] = torch.compile(own, dynamic=False)
    return made


def _times(x: Tensor, q: QTensor) -> Tensor:
    y = torch.empty(x.shape[0], q.shape[0], dtype=torch.float32, device=x.device)
    for rows, w in _row_chunks(q, x.dtype):
        y[:, rows] = x @ w.T
    return y


def _matmul(x: Tensor, state: _State) -> Tensor:
    y: Tensor = _Matmul.apply(x, state)  # type: ignore[no-untyped-call]
    return y


reference = Kernel("reference", accepts=lambda q, act: True, prepack=_State, matmul=_matmul)
