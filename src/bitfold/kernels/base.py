"""What a kernel is: a way to multiply by a QTensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bitfold.qtensor import QTensor

ACTS = ("float", "int8")


@dataclass(frozen=True)
class Kernel:
    """One implementation of y = x W^T for weights it accepts.

    Args:
        name: short name, shown by reports.
        accepts: (weight, act) -> whether this kernel can do it here and now; cheap, called once for a layer.
        prepack: (weight, act) -> whatever `matmul` wants; may share memory with the weight's fields.
        matmul: (x (m, k) floating point, state) -> y (m, n) float32, differentiable with respect to x.
    """

    name: str
    accepts: Callable[[QTensor, str], bool]
    prepack: Callable[[QTensor, str], Any]
    matmul: Callable[[Tensor, Any], Tensor]
