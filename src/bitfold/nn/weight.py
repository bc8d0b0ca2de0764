"""`QWeight`: a quantized weight where a weight tensor stood.

Its fields are buffers: `layer.weight` becomes `layer.weight.codes`, `layer.weight.scale` ... in the state dict and the
checkpoint. Code that uses the weight directly still works: products with it (`torch.nn.functional.linear`, `x @
w.T`, `torch.bmm` with a stack) run its kernel, look-ups decode the rows asked for, any other use gets the dequantized
values (see tensor_like.py). On the meta device nothing is decoded: shapes come out right, which is how a model is
rehearsed before it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from bitfold import kernels
from bitfold.errors import UsageError
from bitfold.formats import AnyFormat
from bitfold.kernels.mixed import mixed_matmul
from bitfold.nn.tensor_like import TensorLike, refuse
from bitfold.qtensor import QTensor
from bitfold.system.tensorinfo import require_rows
from bitfold.transforms import Transform
from bitfold.transforms.activations import ACT_SCALE, read_act, round_static

_MATMUL = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
_BMM = (torch.bmm, torch.Tensor.bmm, *_MATMUL)


class QWeight(TensorLike):
    """A quantized weight as a module without a forward.

    Args:
        qtensor: the weight, (n, k) or (experts, n, k); its fields may live on the meta device.
        act: "float", "int8" for dynamic per-token int8 activations, or another name of `bitfold.acts`.
        transposed: the model's own tensor was (..., k, n): slices and dequantized values come out that way.
        transform: applied to the activations first; the stored weight is expressed in that basis.
        act_scale: (1,) float32, for "int8-static".
        flat: the model's own tensor has the experts one upon the other in the rows of a matrix, and views it as a
            stack.
    """

    def __init__(
        self,
        qtensor: QTensor,
        *,
        act: str = "float",
        transposed: bool = False,
        transform: Transform | None = None,
        act_scale: torch.Tensor | None = None,
        flat: bool = False,
    ) -> None:
        super().__init__()
        self.flat = flat
        self._act = read_act(act)
        self.format: AnyFormat = qtensor.format
        self.qshape = tuple(qtensor.shape)
        self.act = act
        self.transposed = transposed
        self._basis = transform
        self.stored_transposed = transposed
        self.dtype = torch.float32
        self._gain = 1.0  # what code outside multiplied the weight by since it was quantized
        self._field_names = tuple(qtensor.fields)
        self._prepacked: dict[int | str, Any] = {}  # by expert, or by kind of activations; shared with views
        sides = dict(transform.fields()) if transform is not None else {}
        if self._act.static:
            sides[ACT_SCALE] = torch.zeros(1) if act_scale is None else act_scale
        self._side_names = tuple(sides)
        # Not register_buffer: it asks whether the name is taken, and `values` is an attribute of every tensor.
        self._buffers.update({**qtensor.fields, **sides})

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
        whole = (*lead, k, n) if self.transposed else (*lead, n, k)
        return torch.Size((whole[0] * whole[1], whole[2]) if self.flat else whole)

    @property
    def device(self) -> torch.device:
        """Where the fields live."""
        device: torch.device = getattr(self, self._field_names[0]).device
        return device

    @property
    def is_meta(self) -> bool:
        """Whether there is nothing to decode."""
        field: torch.Tensor = getattr(self, self._field_names[0])
        return field.is_meta

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight as the model knew it, in its own or the given dtype."""
        if self.is_meta:
            return torch.empty(self.shape, dtype=dtype or self.dtype, device="meta")
        w = self.qtensor.dequantize()
        w = (w if self.transform is None else self.transform.inverse(w)) * self._gain
        w = w.to(dtype or self.dtype)
        w = w.transpose(-1, -2) if self.transposed else w
        return w.flatten(0, 1) if self.flat else w

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., k) times the weight (n, k) transposed -> (..., n), in the dtype of x, or in that of autocast."""
        n, k = self.qshape
        x = _autocast(x)
        if x.shape[-1] != k:
            raise UsageError(f"the activations have {x.shape[-1]} columns, the weight has {k}")
        if self.is_meta:
            return F.linear(x, torch.empty(self.qshape, dtype=x.dtype, device="meta"))
        turned = x if self.transform is None else self.transform(x)
        y = self._product(turned.reshape(-1, k)).to(x.dtype).reshape(*x.shape[:-1], n)
        return y if self._gain == 1 else y * self._gain

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
        if self.is_meta:
            return F.embedding(ids, self.dequantize())
        require_rows(ids, self.qshape[0], "the embedding")
        unique, inverse = torch.unique(ids, return_inverse=True)
        rows = self.qtensor.rows(unique)
        rows = (rows if self.transform is None else self.transform.inverse(rows)) * self._gain
        return rows.to(self.dtype)[inverse]

    def __getitem__(self, index: Any) -> Any:
        """One expert of a stack, kept in step with the stack's own fields; rows of a table; else of the values."""
        single = isinstance(index, int) or (isinstance(index, torch.Tensor) and _is_ids(index) and index.dim() == 0)
        if len(self.qshape) == 2 and not self.transposed and isinstance(index, torch.Tensor) and _is_ids(index):
            return self.lookup(torch.where(index < 0, index + self.qshape[0], index))
        if len(self.qshape) != 3 or self.flat or not single:
            return self.dequantize()[index]
        i = range(self.qshape[0])[int(index)]
        if i not in self._prepacked:
            self._prepacked[i] = self._with(self.qtensor.expert(i))
        part: QWeight = self._prepacked[i]
        return part._seen(self.dtype, self.transposed, self._gain)

    def view(self, *shape: Any) -> Any:
        """In another shape: experts in the rows of a matrix as the stack that they are, still in few bits."""
        return self._reshaped("view", *shape)

    def reshape(self, *shape: Any) -> Any:
        """See `view`."""
        return self._reshaped("reshape", *shape)

    def unflatten(self, *how: Any) -> Any:
        """See `view`."""
        return self._reshaped("unflatten", *how)

    def _reshaped(self, name: str, *how: Any) -> Any:
        if self.flat:
            stack = self._seen(self.dtype, self.transposed, self._gain, flat=False)
            if getattr(torch.empty(self.shape, device="meta"), name)(*how).shape == stack.shape:
                return stack
        return getattr(self.dequantize(), name)(*how)

    def view_as(self, *, dtype: torch.dtype | None, device: torch.device | None, flip: bool = False) -> Any:
        """The same weight, its fields shared, with another dtype, device, or order of the last two dimensions."""
        if flip and self.flat:  # the experts side by side: no stack that can be multiplied with
            return self.dequantize(dtype).mT
        here = device is None or device == self.device
        base = self if here else self._with(self._moved(device))
        return base._seen(dtype or self.dtype, self.transposed != flip, self._gain, flat=self.flat)

    def scale_by(self, factor: float) -> None:
        """Multiply every weight, in place: what is decoded is multiplied, the fields stay."""
        self._gain *= factor

    def _seen(self, dtype: torch.dtype, transposed: bool, gain: float, flat: bool = False) -> QWeight:
        if (dtype, transposed, gain, flat) == (self.dtype, self.transposed, self._gain, self.flat):
            return self
        view = self._with(self.qtensor)
        view.dtype, view.transposed, view._gain, view.flat = dtype, transposed, gain, flat
        view.stored_transposed, view._prepacked = self.stored_transposed, self._prepacked
        return view

    def _moved(self, device: torch.device | None) -> QTensor:
        fields = {name: getattr(self, name).to(device) for name in self._field_names}
        return QTensor(self.format, self.qshape, fields)

    def _with(self, qtensor: QTensor) -> QWeight:
        scale = self._buffers.get(ACT_SCALE)
        transform = self.transform
        copy = type(self)(qtensor, act=self.act, transposed=self.transposed, transform=transform, act_scale=scale)
        copy.flat = self.flat and len(qtensor.shape) == 3
        return copy

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
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # what the tensor would have become
        for name in (*self._field_names, *self._side_names):
            field = getattr(self, name)
            moved = fn(field)
            self._buffers[name] = moved if moved.dtype == field.dtype else field.to(moved.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._prepacked, self._gain = {}, 1.0
        super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self._gain != 1:
            what = f"the weight was multiplied by {self._gain:g} in place, which its fields do not hold"
            raise UsageError(what, hint="undo that before saving (RWKV does in training mode), or save before running")
        super()._save_to_state_dict(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> QWeight:
        fields = {name: getattr(self, name).clone() for name in self._field_names}
        copy = self._with(QTensor(self.format, self.qshape, fields))
        copy.dtype, copy.stored_transposed, copy._gain = self.dtype, self.stored_transposed, self._gain
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
        packed = _packed(func, args, kwargs)
        if packed is not None:
            return packed
        name = getattr(func, "__name__", "")
        if isinstance(kwargs.get("out"), cls) or (args and isinstance(args[0], cls) and _writes(name)):
            refuse(name)
        floats = [a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
        dtype = floats[0] if floats else None
        return func(*_dequantized(args, dtype), **_dequantized(kwargs, dtype))


def _packed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The products and look-ups that need no dequantized weight; None for anything else."""
    names = {F.linear: ("input", "weight", "bias"), F.embedding: ("input", "weight")}.get(func, ())
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    weight, first = given.get("weight"), given.get("input")
    if not names and len(args) == 2:
        first, weight = args
    if not isinstance(weight, QWeight) or not isinstance(first, torch.Tensor):
        return None
    stack = len(weight.qshape) == 3  # in the rows of a matrix or not
    if func is F.linear and not weight.transposed and not stack:
        y, bias = weight.linear(first), given.get("bias")
        return y if bias is None else y + bias.to(y.dtype)
    if func is F.embedding and kwargs.get("max_norm") is None and not weight.transposed and not stack:
        return weight.lookup(first)
    if func in _MATMUL and weight.transposed and not stack:
        return weight.linear(first)
    if (
        func in _BMM
        and weight.transposed
        and stack
        and not weight.flat
        and first.dim() == 3
        and len(first) == len(weight)
    ):
        return torch.stack([part.linear(x) for part, x in zip(weight, first, strict=True)])
    return None


def _autocast(x: torch.Tensor) -> torch.Tensor:
    """The activations in the dtype in which autocast multiplies, where it is on."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.is_floating_point():
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _is_ids(index: torch.Tensor) -> bool:
    return index.dtype in (torch.int64, torch.int32)


def _writes(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__imul__", "__iadd__")


def _dequantized(value: Any, dtype: torch.dtype | None) -> Any:
    """The same arguments with dequantized weights, in lists as well."""
    if isinstance(value, QWeight):
        return value.dequantize(dtype)
    if isinstance(value, (list, tuple)) and any(isinstance(v, (QWeight, list, tuple)) for v in value):
        return type(value)(_dequantized(v, dtype) for v in value)
    if isinstance(value, dict):
        return {key: _dequantized(v, dtype) for key, v in value.items()}
    return value
