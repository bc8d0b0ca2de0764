"""Layers of a quantized model whose codes are frozen and whose row scales are trained.

The gradient of a row's factor is the sum over tokens of dy * y, so it falls out of what the forward and the backward
pass have at hand: there is no product for it, and a step costs two thirds of one that trains the weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bitfold.formats import rows_rescale
from bitfold.nn import QLinear, QWeight

_LEAST = 1e-4  # of a factor: below, the gradient y / factor is not believed


class FrozenWeight:
    """The numbers of a quantized weight, in the basis of the model.

    Args:
        weight: (n, k).
        dtype: to compute in.
        keep: decode it once; else whenever it is asked for, which takes time and saves memory.
    """

    def __init__(self, weight: QWeight, dtype: torch.dtype, *, keep: bool) -> None:
        self.weight, self.dtype = weight, dtype
        self._kept = self._decoded() if keep else None

    def _decoded(self) -> torch.Tensor:
        return self.weight.dequantize(torch.float32).to(self.dtype).contiguous()

    def __call__(self) -> torch.Tensor:
        """(n, k)."""
        return self._decoded() if self._kept is None else self._kept


class TrainedLinear(nn.Module):
    """y = factor * (x W^T) + b, W frozen.

    Args:
        layer: whose weight and bias it takes.
        weight: its numbers.
        trained: whether there is a factor for each row, a float32 (n, 1) that begins at 1; else the factor is 1.
    """

    def __init__(self, layer: QLinear, weight: FrozenWeight, *, trained: bool) -> None:
        super().__init__()
        self.frozen, self.bias = weight, layer.bias
        self.factor = nn.Parameter(torch.ones(layer.out_features, 1)) if trained else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., k) -> (..., n), in the dtype of x."""
        fixed: Any = _Fixed
        scaled: Any = _Scaled
        y: torch.Tensor
        y = fixed.apply(x, self.frozen) if self.factor is None else scaled.apply(x, self.factor, self.frozen)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Scaled(torch.autograd.Function):
    """x (..., k), factor (n, 1), frozen weight -> factor * (x W^T)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: torch.Tensor, weight: FrozenWeight) -> torch.Tensor:
        y = F.linear(x.to(weight.dtype), weight()).mul_(factor[:, 0].to(weight.dtype)).to(x.dtype)
        ctx.weight = weight
        ctx.save_for_backward(factor, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (dy,), weight = grads, ctx.weight
        factor, y = ctx.saved_tensors
        own = (dy * y).flatten(0, -2).sum(0, dtype=torch.float32)[:, None]
        own = torch.where(factor.abs() > _LEAST, own / factor, 0.0)
        dx = (dy * factor[:, 0].to(dy.dtype)).to(weight.dtype) @ weight()
        return dx.to(dy.dtype), own, None


class _Fixed(torch.autograd.Function):
    """x (..., k), frozen weight -> x W^T; the weight is decoded again in the backward pass where it is not kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: FrozenWeight) -> torch.Tensor:
        ctx.weight = weight
        return F.linear(x.to(weight.dtype), weight()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        dy, weight = grads[0], ctx.weight
        return (dy.to(weight.dtype) @ weight()).to(dy.dtype), None


def frozen_layers(model: nn.Module) -> dict[str, QLinear]:
    """The quantized linear layers of a model, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QLinear)}


def trains_rows(layer: QLinear) -> bool:
    """Whether each row of its weight has a scale that can be trained alone; not where another layer uses the weight."""
    owned = layer._modules.get("weight") is layer.weight
    return owned and rows_rescale(layer.weight.format)


def install(model: nn.Module, dtype: torch.dtype, *, keep: bool, rows: bool = True) -> dict[str, TrainedLinear]:
    """Put trained layers in the place of quantized ones.

    Args:
        model: with quantized layers.
        dtype: to compute in.
        keep: weights are decoded once, see `FrozenWeight`.
        rows: there are factors of rows where there can be; else nothing in them is trained.

    Returns:
        Those that have factors, by the name of the tensor.
    """
    trained: dict[str, TrainedLinear] = {}
    for path, layer in frozen_layers(model).items():
        made = TrainedLinear(layer, FrozenWeight(layer.weight, dtype, keep=keep), trained=rows and trains_rows(layer))
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, made.train(layer.training))
        if made.factor is not None:
            trained[f"{path}.weight"] = made
    return trained
