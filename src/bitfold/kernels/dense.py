"""The native kernel: weights are read from memory once, in their packed layout, and decoded in registers.

    float activations   integers, where the CPU multiplies bytes fast: activations are split into three of them, 23
                        bits below the largest of a token. Else a few rows: decode and multiply in float32; many: some
                        rows of the weight at a time are decoded into the cache and PyTorch multiplies.
    int8 activations    rounded for each token, products in integers, one multiplication by the scale for each group.

`bitfold::linear` is the same as an operator of PyTorch, for torch.compile and autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitfold.kernels.base import Kernel
from bitfold.kernels.layout import Layout, read_layout, read_spec, with_slack, write_spec
from bitfold.qtensor import QTensor
from bitfold.system import backend, native

_FLOAT_ROWS = 16  # rows of activations up to which decoding in registers beats decoding to memory
_CHUNK = 1 << 21  # weights decoded at a time for many rows: 8 MB of float32


@dataclass(frozen=True)
class State:
    """A layout, what it is as text, and the native object that points into its tensors."""

    layout: Layout
    spec: str
    weight: Any
    int8: bool


def accepts(q: QTensor, act: str) -> bool:
    """Whether the native core is there and can multiply by that weight."""
    return backend.core_for(*q.fields.values()) is not None and read_layout(q) is not None


def prepack(q: QTensor, act: str) -> State:
    """Scales in the order the loops want; the codes are not copied."""
    layout = read_layout(q)
    assert layout is not None
    return State(layout, write_spec(layout.spec), _weight(layout), act == "int8")


def matmul(x: Tensor, state: State) -> Tensor:
    """x (m, k) -> (m, n) float32."""
    if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
        w = state.layout
        y: Tensor = torch.ops.bitfold.linear(x, w.codes, w.scale, w.zero, state.spec, state.int8)
        return y
    return _run(x, state.weight, state.layout, state.int8)


def _weight(w: Layout) -> Any:
    core = native.core()
    assert core is not None
    return w.weight(core)


def _run(x: Tensor, weight: Any, w: Layout, int8: bool) -> Tensor:
    core = native.core()
    assert core is not None
    x = x.detach().to(torch.float32).contiguous()
    m = x.shape[0]
    y = torch.empty(m, w.n, dtype=torch.float32)
    if m <= _FLOAT_ROWS or (w.spec.integers and (int8 or m <= core.split_rows())):
        core.matmul(weight, x.data_ptr(), m, int8, y.data_ptr(), native.threads())
        return y
    scale = None
    if int8:
        from bitfold.kernels.activations import quantize_tokens

        codes, scale = quantize_tokens(x)
        x = codes.float()
    for rows, part in _decoded(weight, w):
        y[:, rows] = x @ part.T
    return y if scale is None else y.mul_(scale)


def _decoded(weight: Any, w: Layout) -> Iterator[tuple[slice, Tensor]]:
    core = native.core()
    assert core is not None
    step = max(64, _CHUNK // w.spec.k // 32 * 32)  # tiles of a trellis have 32 rows
    room = torch.empty(min(step, w.n), w.spec.k, dtype=torch.float32)
    for at in range(0, w.n, step):
        stop = min(at + step, w.n)
        core.dequantize(weight, at, stop, room.data_ptr(), native.threads())
        yield slice(at, stop), room[: stop - at]


def _layout(codes: Tensor, scale: Tensor, zero: Tensor | None, spec: str) -> Layout:
    zero = None if zero is None else with_slack(zero)
    return Layout(read_spec(spec), codes.contiguous(), with_slack(scale), zero)


@torch.library.custom_op("bitfold::linear", mutates_args=(), device_types="cpu")
def _linear(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, spec: str, int8: bool) -> Tensor:
    layout = _layout(codes, scale, zero, spec)
    return _run(x, _weight(layout), layout, int8)


@torch.library.custom_op("bitfold::linear_backward", mutates_args=(), device_types="cpu")
def _linear_backward(grad: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, spec: str) -> Tensor:
    layout = _layout(codes, scale, zero, spec)
    out = torch.zeros(grad.shape[0], layout.spec.k, dtype=torch.float32)
    for rows, part in _decoded(_weight(layout), layout):
        out.addmm_(grad[:, rows].float(), part)
    return out


@_linear.register_fake
def _linear_shape(x: Tensor, codes: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], scale.shape[0], dtype=torch.float32)


@_linear_backward.register_fake
def _linear_backward_shape(grad: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, spec: str) -> Tensor:
    return grad.new_empty(grad.shape[0], read_spec(spec).k, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, zero, ctx.spec, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(codes, scale, zero)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Only x has a gradient; int8 rounding of x is passed straight through."""
    codes, scale, zero = ctx.saved_tensors
    back = torch.ops.bitfold.linear_backward(grad, codes, scale, zero, ctx.spec)
    return back.to(ctx.dtype), None, None, None, None, None


_linear.register_autograd(_backward, setup_context=_save)

cpu = Kernel("cpu", accepts, prepack, matmul)
