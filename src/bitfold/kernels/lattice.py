"""The native kernel for lattice weights (`e8p`): some rows at a time become bytes in the cache, multiplied there.

A format shows that it is one by its `magnitudes`: the table that the low byte of its codes looks up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitfold.kernels.base import Kernel
from bitfold.kernels.layout import with_slack
from bitfold.kernels.reference import reference
from bitfold.qtensor import QTensor
from bitfold.system import backend, native

_FLOAT_ROWS = 16  # rows of activations up to which this beats decoding to memory


@dataclass(frozen=True)
class State:
    """The weight, the native object that points into its tensors, and those tensors."""

    q: QTensor
    act: str
    weight: Any
    alive: tuple[Tensor, ...]

    @property
    def int8(self) -> bool:
        """Whether activations are rounded to 8 bits."""
        return self.act == "int8"


def accepts(q: QTensor, act: str) -> bool:
    """Whether the native core is there and the weight is on a lattice."""
    lattice = len(q.shape) == 2 and q.format.magnitudes is not None
    return lattice and hasattr(backend.core_for(*q.fields.values()), "LatticeWeight")


def prepack(q: QTensor, act: str) -> State:
    """Nothing is copied but the scales, where nothing readable lies behind them."""
    core, magnitudes = native.core(), q.format.magnitudes
    assert core is not None
    assert magnitudes is not None
    table = magnitudes()
    codes, scale = q.fields["codes"].contiguous(), with_slack(q.fields["scale"].contiguous())
    weight = core.LatticeWeight(codes.data_ptr(), *q.shape, scale.data_ptr(), table.data_ptr())
    return State(q, act, weight, (codes, scale, table))


def matmul(x: Tensor, state: State) -> Tensor:
    """x (m, k) -> (m, n) float32."""
    watched = torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled())
    core = native.core()
    if watched or core is None or (state.act == "float" and len(x) > _FLOAT_ROWS):
        return reference.matmul(x, reference.prepack(state.q, state.act))
    x = x.detach().to(torch.float32).contiguous()
    y = torch.empty(len(x), state.q.shape[0], dtype=torch.float32)
    core.matmul(state.weight, x.data_ptr(), len(x), state.int8, y.data_ptr(), native.threads())
    return y


lattice = Kernel("lattice", accepts, prepack, matmul)
