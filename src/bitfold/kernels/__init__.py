"""Kernels multiply by QTensors. The first that accepts a weight wins; `reference` accepts everything and is last."""

from __future__ import annotations

from bitfold.errors import UsageError
from bitfold.kernels.base import ACTS, Kernel
from bitfold.kernels.dense import cpu
from bitfold.kernels.fused import triton
from bitfold.kernels.ggml import ggml
from bitfold.kernels.lattice import lattice
from bitfold.kernels.reference import reference
from bitfold.qtensor import QTensor

__all__ = ["ACTS", "KERNELS", "Kernel", "select"]

KERNELS: dict[str, Kernel] = {k.name: k for k in (cpu, lattice, ggml, triton, reference)}


def select(q: QTensor, act: str = "float", *, name: str | None = None) -> Kernel:
    """The kernel for an (n, k) weight.

    Args:
        q: the weight.
        act: "float", or "int8" for dynamic per-token int8 activations.
        name: force this kernel.

    Raises:
        UsageError: unknown act, or the forced kernel is unknown or does not accept the weight.
    """
    if act not in ACTS:
        raise UsageError(f"unknown activation type {act!r}", where="act", hint=" or ".join(ACTS))
    if name is not None and name not in KERNELS:
        raise UsageError(f"unknown kernel {name!r}", hint=f"one of: {', '.join(KERNELS)}")
    for kernel in KERNELS.values():
        if name in (None, kernel.name) and kernel.accepts(q, act):
            return kernel
    raise UsageError(f"kernel {name!r} does not do {q.format.name} with {act} activations here")
