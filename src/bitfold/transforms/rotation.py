"""The Hadamard rotation by the native core: O(k log k) additions, the same bits on every instruction set.

`bitfold::hadamard` is an operator of PyTorch, for torch.compile and autograd; without the core there is none, and
`bitfold.transforms.hadamard` multiplies by the factors.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitfold.system import backend, native


@dataclass(frozen=True)
class RotationPlan:
    """A rotation and its inverse as the core takes them, and the tensors that they point into."""

    forward: Any
    inverse: Any
    alive: tuple[Tensor, ...]


@functools.lru_cache(maxsize=256)
def rotation_plan(size: int, seed: int) -> RotationPlan:
    """Blocks are matrices (order, width): a dense one of +1 and -1, and butterflies of a power of two."""
    from bitfold.transforms.hadamard import factors, signs

    parts = list(factors(size))
    dense = [h for h in parts if len(h) & (len(h) - 1)]
    width = math.prod(len(h) for h in parts) // math.prod(len(h) for h in dense)
    order = len(dense[0]) if dense else 1
    matrix = dense[0].float().sign().contiguous() if dense else torch.empty(0, 0)
    transposed, sign = matrix.T.contiguous(), signs(size, seed).float().contiguous()
    core, scale = native.core(), 1 / math.sqrt(order * width)
    assert core is not None

    def rotation(factor: Tensor, inverse: bool) -> Any:
        address = factor.data_ptr() if order > 1 else 0
        return core.Rotation(
            size=size, width=width, order=order, matrix=address, signs=sign.data_ptr(), scale=scale, inverse=inverse
        )

    return RotationPlan(rotation(matrix, False), rotation(transposed, True), (matrix, transposed, sign))


def rotates(x: Tensor) -> bool:
    """Whether the core can do it: on the CPU, in at most 32 bits."""
    narrow = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return narrow and backend.has_core(x.device)


def rotate(x: Tensor, size: int, seed: int, *, inverse: bool) -> Tensor:
    """x (..., size) -> x R or x R^T in the dtype of x, float32 inside; differentiable."""
    if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
        y: Tensor = torch.ops.bitfold.hadamard(x, size, seed, inverse)
        return y
    return _run(x, size, seed, inverse)


def _run(x: Tensor, size: int, seed: int, inverse: bool) -> Tensor:
    core, plan = native.core(), rotation_plan(size, seed)
    assert core is not None
    wide = x.detach().to(torch.float32).contiguous()
    y = torch.empty_like(wide)
    if wide.numel():
        rotation = plan.inverse if inverse else plan.forward
        core.rotate(rotation, wide.data_ptr(), wide.numel() // size, y.data_ptr(), native.threads())
    return y.to(x.dtype)


@torch.library.custom_op("bitfold::hadamard", mutates_args=(), device_types="cpu")
def _hadamard(x: Tensor, size: int, seed: int, inverse: bool) -> Tensor:
    return _run(x, size, seed, inverse)


@_hadamard.register_fake
def _hadamard_shape(x: Tensor, size: int, seed: int, inverse: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.size, ctx.seed, ctx.inverse = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """A rotation's transpose is its inverse."""
    return torch.ops.bitfold.hadamard(grad, ctx.size, ctx.seed, not ctx.inverse), None, None, None


_hadamard.register_autograd(_backward, setup_context=_save)
