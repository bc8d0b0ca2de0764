"""A device that any machine has: tensors with values that will not meet those of the CPU.

Code for accelerators goes wrong where it makes a tensor on the CPU, or hands an address to native code. Both end here
as they do there: the values are on the CPU, but no operation takes them together with a tensor of the CPU, and native
code finds nothing at their addresses. What a real device computes differently, this one does not show.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.backend_registration
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

NAME = "npy"  # of PyTorch's own place for devices written in Python


class _Nobody(torch.utils.backend_registration._DummyBackendModule):
    """Says that there is no such device, so that no library takes it for an accelerator."""

    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 0


class _NoHook(torch.utils.backend_registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False


torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME, _Nobody(), _NoHook())
DEVICE = torch.device(NAME)
_aten = torch.ops.aten
_MOVES = (_aten._to_copy.default, _aten.copy_.default, _aten._local_scalar_dense.default)


class There(torch.Tensor):
    """A tensor on that device.

    Args:
        inner: its values, on the CPU.
    """

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> There:
        found: There = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=inner.requires_grad,
        )
        found.inner = inner
        return found

    def __repr__(self) -> str:
        return f"There({self.inner!r})"

    def data_ptr(self) -> int:
        """An address that tells tensors apart, and at which native code finds nothing."""
        return self.inner.data_ptr() | 1 << 62

    def tolist(self) -> Any:
        """The values."""
        return self.inner.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, There) else value


def _outer(value: Any) -> Any:
    return There(value) if isinstance(value, torch.Tensor) and not isinstance(value, There) else value


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    asked, seen = kwargs.get("device"), []
    tree_map(lambda v: seen.append(v) if isinstance(v, torch.Tensor) else None, (args, kwargs))
    here = [t for t in seen if not isinstance(t, There) and t.dim() > 0]
    there = any(isinstance(t, There) for t in seen)
    if there and here and func not in _MOVES:
        raise RuntimeError(f"{func}: tensors on {NAME} and on the CPU")
    to_there = asked is not None and torch.device(asked).type == NAME
    if to_there:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if func is _aten.copy_.default:
        return args[0]
    if (asked is None and not there) or (asked is not None and not to_there):
        return out
    return return_and_correct_aliasing(func, args, kwargs, tree_map(_outer, out)) if there else tree_map(_outer, out)


class _Makes(TorchDispatchMode):
    """Tensors that are asked for on that device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _FromNumbers(TorchFunctionMode):
    """torch.tensor does not ask the dispatcher: made on the CPU, and moved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if func not in (torch.tensor, torch.as_tensor) or device is None or torch.device(device).type != NAME:
            return func(*args, **kwargs)
        return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)


@contextmanager
def device() -> Iterator[torch.device]:
    """The device, as long as the context lasts."""
    with _Makes(), _FromNumbers():
        yield DEVICE
