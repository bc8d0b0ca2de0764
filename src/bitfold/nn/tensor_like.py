"""What plain PyTorch code may ask of `layer.weight`, answered by a weight that is no tensor.

Model code reads shapes and dtypes, slices, transposes, adds, casts, puts weights into lists for `torch.cat`. Everything
that a tensor answers and a quantized weight does not answer itself is asked of its dequantized values. What would write
into the weight cannot be done to codes and is refused in words, but for scaling all of it by one number.

Only `isinstance(weight, torch.Tensor)` is not answered as a tensor would: that takes a subclass with storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from bitfold.errors import UsageError

_SIZES = ("size", "dim", "ndim", "ndimension", "numel", "nelement", "stride", "element_size", "itemsize", "layout")
_AUTOGRAD = ("grad", "grad_fn", "requires_grad", "retains_grad")
_OPERATORS = (
    *("__matmul__", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__"),
    *("__pow__", "__rpow__", "__floordiv__", "__mod__", "__neg__", "__abs__", "__lt__", "__le__", "__gt__", "__ge__"),
)


class TensorLike(nn.Module):
    """A module that stands where a tensor stood, and answers as that tensor would."""

    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that this stands for."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where it is."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor."""
        raise NotImplementedError

    def view_as(self, *, dtype: torch.dtype | None, device: torch.device | None, flip: bool = False) -> Any:
        """The same weight, its fields shared, with another dtype, device, or order of the last two dimensions."""
        raise NotImplementedError

    def scale_by(self, factor: float) -> None:
        """Multiply every weight, in place."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(torch.Tensor, name):
                raise
        if name.endswith("_"):
            return partial(self._write, name)
        if name in _SIZES or name in _AUTOGRAD:
            return getattr(torch.empty(self.shape, dtype=self.dtype, device="meta"), name)
        if name.startswith(("is_", "new_")):
            return getattr(torch.empty((0,) * len(self.shape), dtype=self.dtype, device=self.device), name)
        return getattr(self.dequantize(), name)

    # Writing.
    def _write(self, name: str, *args: Any, **kwargs: Any) -> TensorLike:
        """An operation in place: by one number for all weights, or refused."""
        if name in ("mul_", "div_", "multiply_", "divide_") and len(args) == 1 and not kwargs and _is_number(args[0]):
            factor = float(args[0])
            self.scale_by(factor if name.startswith("mul") else 1 / factor)
            return self
        refuse(name)

    def __imul__(self, other: Any) -> TensorLike:
        return self._write("mul_", other)

    def __itruediv__(self, other: Any) -> TensorLike:
        return self._write("div_", other)

    def __setitem__(self, index: Any, value: Any) -> None:
        refuse("__setitem__")

    # What nn.Module has under the same name, and means otherwise.
    @property
    def data(self) -> Any:
        """Itself: no graph hangs on it."""
        return self

    @data.setter
    def data(self, value: Any) -> None:
        refuse("data = ...")

    def detach(self) -> Any:
        """Itself: no graph hangs on it."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The weight with another dtype or on another device, as `torch.Tensor.to`: still in few bits."""
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        same = (dtype is None or dtype == self.dtype) and (device is None or device == self.device)
        return self if same else self.view_as(dtype=dtype, device=device)

    def type(self, dst_type: torch.dtype | str | None = None) -> Any:
        """The name of the type, or the weight in another, as `torch.Tensor.type`."""
        if dst_type is None:
            return torch.empty(0, dtype=self.dtype).type()
        return self.to(dst_type if isinstance(dst_type, torch.dtype) else torch.empty(0).type(dst_type).dtype)

    def float(self) -> Any:
        """In float32."""
        return self.to(torch.float32)

    def double(self) -> Any:
        """In float64."""
        return self.to(torch.float64)

    def half(self) -> Any:
        """In float16."""
        return self.to(torch.float16)

    def bfloat16(self) -> Any:
        """In bfloat16."""
        return self.to(torch.bfloat16)

    def cpu(self) -> Any:
        """On the CPU."""
        return self.to("cpu")

    def cuda(self, device: int | torch.device | None = None) -> Any:
        """On a CUDA device."""
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device or "cuda")

    # The same memory in another order of dimensions: still in few bits.
    @property
    def T(self) -> Any:
        """Transposed; of two dimensions still in few bits."""
        return self.mT if len(self.shape) == 2 else self.dequantize().T

    @property
    def mT(self) -> Any:
        """The last two dimensions exchanged."""
        return self.view_as(dtype=None, device=None, flip=True)

    def t(self) -> Any:
        """Transposed."""
        return self.mT if len(self.shape) == 2 else self.dequantize().t()

    def transpose(self, dim0: int, dim1: int) -> Any:
        """Two dimensions exchanged; the last two still in few bits."""
        count = len(self.shape)
        last = {dim0 % count, dim1 % count} == {count - 2, count - 1}
        return self.mT if last else self.dequantize().transpose(dim0, dim1)

    def __len__(self) -> int:
        return self.shape[0]

    def __bool__(self) -> bool:
        return True  # a module in `if layer.weight`; a tensor with several elements has no truth

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        raise NotImplementedError

    def __eq__(self, other: object) -> Any:
        return self.dequantize() == other if _has_values(other) else self is other

    def __ne__(self, other: object) -> Any:
        return self.dequantize() != other if _has_values(other) else self is not other

    __hash__ = nn.Module.__hash__

    # Copies.
    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        hint = "bitfold.save writes the model, and state_dict() has its tensors"
        raise UsageError("a quantized weight is not pickled", hint=hint)

    def __copy__(self) -> Any:
        return self.view_as(dtype=None, device=None)


def refuse(name: str) -> NoReturn:
    """UsageError: `name` would write into a quantized weight."""
    hint = "quantize after changing the weight, or keep it in floating point (--ignore)"
    raise UsageError(f"{name} would write into a quantized weight", hint=hint)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)


def _has_values(value: object) -> bool:
    return isinstance(value, (int, float, torch.Tensor, TensorLike))


def _operator(name: str) -> Callable[..., Any]:
    def operate(self: TensorLike, *others: Any) -> Any:
        floats = [o.dtype for o in others if isinstance(o, torch.Tensor) and o.is_floating_point()]
        return getattr(self.dequantize(floats[0] if floats else None), name)(*others)

    return operate


for _name in _OPERATORS:
    setattr(TensorLike, _name, _operator(_name))
