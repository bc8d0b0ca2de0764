"""The native kernel for ggml's blocks, as GGUF files hold them: read once, where they are, and decoded in registers.

A few rows of float activations are rounded to 15 bits, one scale for each row, and multiplied in integers: what that
loses is a thousandth of what 8 bits lose. Many rows are multiplied in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitfold.kernels.base import Kernel
from bitfold.kernels.reference import reference
from bitfold.qtensor import QTensor
from bitfold.system import backend, native


@dataclass(frozen=True)
class State:
    """The weight, the native object that points into its blocks, and those blocks."""

    q: QTensor
    weight: Any
    int8: bool
    alive: Tensor


def accepts(q: QTensor, act: str) -> bool:
    """Whether the native core is there and knows the type of blocks."""
    core = None if q.format.ggml is None else backend.core_for(q.fields["blocks"])
    if core is None or q.format.ggml not in core.ggml_types():
        return False
    return len(q.shape) == 2 and 0 not in q.shape


def prepack(q: QTensor, act: str) -> State:
    """Nothing is copied."""
    core = native.core()
    assert core is not None
    blocks = q.fields["blocks"].contiguous()
    return State(q, core.GgmlWeight(q.format.ggml, blocks.data_ptr(), *q.shape), act == "int8", blocks)


def matmul(x: Tensor, state: State) -> Tensor:
    """x (m, k) -> (m, n) float32."""
    core = native.core()
    if torch.compiler.is_compiling() or core is None or (x.requires_grad and torch.is_grad_enabled()):
        return reference.matmul(x, reference.prepack(state.q, "int8" if state.int8 else "float"))
    x = x.detach().to(torch.float32).contiguous()
    y = torch.empty(len(x), state.q.shape[0], dtype=torch.float32)
    core.matmul(state.weight, x.data_ptr(), len(x), state.int8, y.data_ptr(), native.threads())
    return y


ggml = Kernel("ggml", accepts, prepack, matmul)
