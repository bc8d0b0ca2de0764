"""Products of up to 16 rows on devices that have Triton: packed weights are decoded in registers (triton_gemv.py).

More rows, gradients and what is being compiled take the plain route: tiles of decoded weights, and PyTorch's product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from bitfold.formats import Format
from bitfold.formats.families.viterbi import window_values
from bitfold.kernels.activations import quantize_tokens
from bitfold.kernels.base import Kernel
from bitfold.kernels.reference import reference
from bitfold.qtensor import QTensor
from bitfold.system import backend

MOST_ROWS = 16  # of activations


@dataclass(frozen=True)
class State:
    """The weight, and what its kernel is called with besides the activations."""

    q: QTensor
    act: str
    arguments: tuple[Any, ...]


def accepts(q: QTensor, act: str) -> bool:
    """Whether there is Triton where the weight is, and a kernel for it."""
    device = next(iter(q.fields.values())).device
    return backend.has_triton(device) and has_kernel(q)


def has_kernel(q: QTensor) -> bool:
    """Whether it is a trellis, or codes of 1 to 8 bits with scales of rows, of groups of columns, or of the whole."""
    if len(q.shape) != 2 or 0 in q.shape:
        return False
    if q.format.code is not None:
        return True
    scale, grid = q.format.scale, q.format.grid
    return grid is not None and not grid.trits and scale is not None and scale.block[0] in (0, 1)


def prepack(q: QTensor, act: str) -> State:
    """Scales as plain numbers, in 16 bits where that changes none; codes as they are."""
    if q.format.code is not None:
        tiles, scale = q.fields["tiles"].contiguous(), q.fields["scale"].contiguous()
        return State(q, act, (tiles, scale, window_values(q.format.code, tiles.device), q.format.code.bits))
    form = cast(Format, q.format)  # what has a grid is one
    codes, params = q.fields["codes"].contiguous(), form.load_params(q.fields, q.shape)
    assert params is not None
    zero = None if params.zero_point is None else _compact(params.zero_point)
    points = torch.tensor(form.grid.points, dtype=torch.float32).to(codes.device)
    how = {"bits": form.grid.code_bits, "group": form.blocks(q.shape).cols, "table": not form.grid.uniform}
    return State(q, act, (codes, _compact(params.scale), zero, points, {**how, "first": form.grid.points[0]}))


def _compact(values: Tensor) -> Tensor:
    small = values.to(torch.bfloat16)
    return small.contiguous() if torch.equal(small.float(), values) else values.contiguous()


def matmul(x: Tensor, state: State) -> Tensor:
    """x (m, k) -> (m, n) float32."""
    watched = torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled())
    if watched or not 0 < len(x) <= MOST_ROWS:
        return reference.matmul(x, reference.prepack(state.q, state.act))
    from bitfold.kernels import triton_gemv

    multiply = triton_gemv.dense if state.q.format.code is None else triton_gemv.trellis
    with backend.current(x.device):
        if state.act == "float":
            return multiply(x.detach().contiguous(), *state.arguments)
        codes, scale = quantize_tokens(x.detach())
        return multiply(codes.float(), *state.arguments) * scale


triton = Kernel("triton", accepts, prepack, matmul)
