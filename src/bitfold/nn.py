"""Layers whose weights are QTensors.

`QWeight` stands where a weight tensor stood: its fields are buffers, so `layer.weight` becomes `layer.weight.codes`,
`layer.weight.scale` ... in the state dict and in the checkpoint. Code that uses the weight directly still works: as the
second argument of `torch.nn.functional.linear` a QWeight runs its kernel, for any other torch function it is
dequantized first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bitfold import kernels
from bitfold.errors import UsageError
from bitfold.formats import AnyFormat
from bitfold.kernels.mixed import mixed_matmul
from bitfold.qtensor import QTensor
from bitfold.system.tensorinfo import require_rows
from bitfold.transforms import Transform
from bitfold.transforms.activations import ACT_SCALE, read_act, round_static


class QWeight(nn.Module):
    """A quantized weight as a module without a forward.

    Args:
        qtensor: the weight, (n, k) or (experts, n, k); its fields may live on the meta device.
        act: "float", "int8" for dynamic per-token int8 activations, or another name of `bitfold.acts`.
        transposed: the model's own tensor was (..., k, n): slices and dequantized values come out that way.
        transform: applied to the activations first; the stored weight is expressed in that basis.
        act_scale: (1,) float32, for "int8-static".
    """

    def __init__(
        self,
        qtensor: QTensor,
        *,
        act: str = "float",
        transposed: bool = False,
        transform: Transform | None = None,
        act_scale: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self._act = read_act(act)
        self.format: AnyFormat = qtensor.format
        self.qshape = tuple(qtensor.shape)
        self.act = act
        self.transposed = transposed
        self._basis = transform
        self.stored_transposed = transposed
        self.dtype = torch.float32
        self._field_names = tuple(qtensor.fields)
        self._prepacked: dict[int | str, Any] = {}  # by expert, or by kind of activations
        sides = dict(transform.fields()) if transform is not None else {}
        if self._act.static:
            sides[ACT_SCALE] = torch.zeros(1) if act_scale is None else act_scale
        self._side_names = tuple(sides)
        for name, field in {**qtensor.fields, **sides}.items():
            self.register_buffer(name, field)

    @property
    def transform(self) -> Transform | None:
        """Applied to the activations first."""
        basis = self._basis
        return basis and basis.with_fields({name: getattr(self, name) for name in self._side_names})

    @property
    def qtensor(self) -> QTensor:
        """The weight as it is stored."""
        return QTensor(self.format, self.qshape, {name: getattr(self, name) for name in self._field_names})

    @property
    def nbytes(self) -> int:
        """Stored bytes, with what stands beside the weight."""
        sides: list[torch.Tensor] = [getattr(self, name) for name in self._side_names]
        return self.qtensor.nbytes + sum(side.numel() * side.element_size() for side in sides)

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that this weight stands for."""
        *lead, n, k = self.qshape
        return torch.Size((*lead, k, n) if self.transposed else (*lead, n, k))

    @property
    def device(self) -> torch.device:
        """Where the fields live."""
        device: torch.device = getattr(self, self._field_names[0]).device
        return device

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight as the model knew it, in float32 or the given dtype."""
        w = self.qtensor.dequantize()
        w = (w if self.transform is None else self.transform.inverse(w)).to(dtype or self.dtype)
        return w.transpose(-1, -2) if self.transposed else w

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., k) times the weight (n, k) transposed -> (..., n), in the dtype of x."""
        n, k = self.qshape
        if x.shape[-1] != k:
            raise UsageError(f"the activations have {x.shape[-1]} columns, the weight has {k}")
        turned = x if self.transform is None else self.transform(x)
        y = self._product(turned.reshape(-1, k))
        return y.to(x.dtype).reshape(*x.shape[:-1], n)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if self._act.static:
            x = round_static(x, self._buffers[ACT_SCALE])  # type: ignore[arg-type]
        product, threshold = self._bound(self._act.kernel), self._act.threshold
        if threshold is None:
            return product(x)
        return mixed_matmul(x, self.qtensor, threshold, product, lambda: self._bound("float"))

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of an embedding table: ids of any shape -> (..., k); only the rows asked for are decoded.

        Raises:
            UsageError: an id that the table has no row for.
        """
        require_rows(ids, self.qshape[0], "the embedding")
        unique, inverse = torch.unique(ids, return_inverse=True)
        rows = self.qtensor.rows(unique)
        return (rows if self.transform is None else self.transform.inverse(rows)).to(self.dtype)[inverse]

    def __getitem__(self, index: int | torch.Tensor) -> QWeight:
        """One expert of a stack, kept in step with the stack's own fields."""
        i = int(index)
        if i not in self._prepacked:
            self._prepacked[i] = self._with(self.qtensor.expert(i))
        part: QWeight = self._prepacked[i]
        return part

    def _with(self, qtensor: QTensor) -> QWeight:
        scale = self._buffers.get(ACT_SCALE)
        return QWeight(qtensor, act=self.act, transposed=self.transposed, transform=self.transform, act_scale=scale)

    def _bound(self, act: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """The product x -> x W^T with that kind of activations, prepacked the first time."""
        if act not in self._prepacked:
            kernel = kernels.select(self.qtensor, act)
            self._prepacked[act] = (kernel.matmul, kernel.prepack(self.qtensor, act))
        matmul, state = self._prepacked[act]
        return lambda x: matmul(x, state)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QWeight:
        """Move with the model, but never change the dtype of a field: it is part of the format."""
        self._prepacked = {}
        for name in (*self._field_names, *self._side_names):
            field = getattr(self, name)
            moved = fn(field)
            self._buffers[name] = moved if moved.dtype == field.dtype else field.to(moved.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._prepacked = {}
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepacked": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> QWeight:
        fields = {name: getattr(self, name).clone() for name in self._field_names}
        copy = self._with(QTensor(self.format, self.qshape, fields))
        copy.dtype, copy.stored_transposed = self.dtype, self.stored_transposed
        memo[id(self)] = copy
        return copy

    def extra_repr(self) -> str:
        """For printing."""
        return f"{self.format.name}, shape={tuple(self.shape)}, act={self.act}"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.linear and len(args) > 1 and isinstance(args[1], cls) and not args[1].transposed:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            y = args[1].matmul(args[0])
            return y if bias is None else y + bias
        if func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__) and _is_right_factor(args, cls):
            return args[1].matmul(args[0])
        if func is F.embedding and len(args) > 1 and isinstance(args[1], cls):
            return args[1].lookup(args[0])
        plain = [_dequantized(a, args) for a in args]
        return func(*plain, **{key: _dequantized(value, args) for key, value in kwargs.items()})


def _is_right_factor(args: Sequence[Any], cls: type[QWeight]) -> bool:
    return len(args) == 2 and isinstance(args[1], cls) and args[1].transposed and len(args[1].qshape) == 2


def _dequantized(value: Any, args: Sequence[Any]) -> Any:
    if not isinstance(value, QWeight):
        return value
    floats = [a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
    return value.dequantize(floats[0] if floats else None)


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
        y = self.weight.matmul(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

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
        return self.weight.lookup(ids)

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
