"""Layers whose weights are quantized."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from bitfold.errors import UsageError
from bitfold.nn.weight import QWeight
from bitfold.qtensor import QTensor
from bitfold.transforms import Transform


def attach(
    module: nn.Module,
    weight: QTensor | QWeight,
    *,
    act: str = "float",
    name: str = "weight",
    transform: Transform | None = None,
) -> QWeight:
    """Give a module its quantized weight.

    A QWeight that is passed in belongs to another layer (tied weights): it is only referred to, so that its fields
    stand once in the state dict, under the name of the layer that owns it.
    """
    if isinstance(weight, QWeight):
        object.__setattr__(module, name, weight)
        return weight
    owned = QWeight(weight, act=act, transform=transform)
    setattr(module, name, owned)
    return owned


class QLinear(nn.Module):
    """y = transform(x) W^T + b with W in few bits.

    Args:
        qtensor: the weight (n, k), or a QWeight to share with another layer.
        bias: (n,) float, or None.
        transform: applied to the activations first (the weight is expressed in the transformed basis).
        act: "float", "int8" or "int8-mixed:6.0", see QWeight.
    """

    def __init__(
        self,
        qtensor: QTensor | QWeight,
        bias: torch.Tensor | None = None,
        transform: Transform | None = None,
        *,
        act: str = "float",
    ) -> None:
        super().__init__()
        self.weight: QWeight
        attach(self, qtensor, act=act, transform=transform)
        if len(self.weight.qshape) != 2:
            raise UsageError(f"a linear layer has a weight (n, k), not {self.weight.qshape}")
        self.out_features, self.in_features = self.weight.qshape
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of x."""
        return F.linear(x, self.weight, self.bias)  # type: ignore[arg-type]  # the weight may be given another tensor

    def extra_repr(self) -> str:
        """For printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class QEmbedding(nn.Module):
    """Rows of a quantized table; only the rows asked for are decoded.

    Args:
        qtensor: the table (vocabulary, width), or a QWeight to share with an output head.
        padding_idx: kept for callers that ask; padding rows are ordinary rows.
    """

    def __init__(self, qtensor: QTensor | QWeight, padding_idx: int | None = None) -> None:
        super().__init__()
        self.weight: QWeight
        attach(self, qtensor)
        self.num_embeddings, self.embedding_dim = self.weight.qshape
        self.padding_idx = padding_idx

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids of any shape -> (..., width), in the dtype of the model."""
        return F.embedding(ids, self.weight)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """For printing."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


def set_tensor(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a value where a parameter (then one without gradient) or a buffer of that dotted name is."""
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    if attribute in owner._buffers:
        owner._buffers[attribute] = value
    else:
        owner._parameters[attribute] = nn.Parameter(value, requires_grad=False)
