"""What a device does the work with: which packs, rounds, rotates and multiplies.

    cpu             the native core, where it is (`native`); without it, PyTorch
    cuda, xpu       PyTorch; where Triton is, tiles of weights are decoded by code that `torch.compile` makes, and a few
                    rows of activations are multiplied by kernels of our own
    mps             PyTorch

Who has tensors in hand asks here, and nowhere else, whether the core may take them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from bitfold.errors import ResourceError, UsageError
from bitfold.system import native, progress
from bitfold.system.units import size_text

Made = TypeVar("Made", bound=Callable[..., Any])
CPU = torch.device("cpu")
DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
_ACCELERATORS = ("cuda", "xpu", "mps")
_SCRATCH = 1 << 30  # bytes of temporaries that a step may make, where no ceiling says less
_PART = 4  # of a ceiling, for temporaries
_CEILINGS: dict[str, int] = {}


def present() -> list[str]:
    """Kinds of devices that this PyTorch sees here, the CPU first."""
    return ["cpu", *(kind for kind in _ACCELERATORS if _is_there(kind))]


def _is_there(kind: str) -> bool:
    module = torch.backends.mps if kind == "mps" else getattr(torch, kind, None)
    return module is not None and bool(module.is_available())


def find_device(name: str | torch.device) -> torch.device:
    """The device of that name, or the device itself; "auto": the accelerator that PyTorch sees, else the CPU.

    Raises:
        UsageError: an unknown name, or a device that is not there.
    """
    if isinstance(name, torch.device):
        return name
    kind, _, number = name.partition(":")
    here = present()
    if kind not in DEVICES or (number and not (kind in ("cuda", "xpu") and number.isdecimal())):
        raise UsageError(f"unknown device {name!r}", where="--device", hint=f"one of {', '.join(DEVICES)}")
    if kind == "auto":
        return torch.device(here[1] if len(here) > 1 else "cpu")
    if kind not in here or (number and int(number) >= _module(kind).device_count()):
        what = f"PyTorch {torch.__version__} sees no {name} here"
        raise UsageError(what, where="--device", hint=f"there is {', '.join(here)}")
    return torch.device(name)


def open_device(name: str | torch.device, limit: int | None = None) -> torch.device:
    """`find_device`, under a ceiling of its memory (see `set_ceiling`); says which it is, unless it is the CPU by name.

    Raises:
        UsageError, ResourceError: it is not there, or does not have the memory.
    """
    device = find_device(name)
    set_ceiling(device, limit)
    if name != "cpu":
        progress.say(f"device: {describe(device)}")
    return device


def describe(device: torch.device) -> str:
    """One line: the device, and what works there."""
    if device.type == "cpu":
        return f"cpu, {'the native core' if native.core() is not None else 'PyTorch without the native core'}"
    name = str(_module(device.type).get_device_name(device)) if device.type in ("cuda", "xpu") else "Apple GPU"
    return f"{device} ({name}), {'PyTorch and Triton' if has_triton(device) else 'PyTorch'}"


def fast_dtype() -> torch.dtype:
    """What products are computed in: bfloat16 where the CPU multiplies it (AMX, AVX-512 BF16), else float32."""
    cpu: Any = torch.cpu
    fast = any(getattr(cpu, name, bool)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return torch.bfloat16 if fast else torch.float32


def core_for(*tensors: Tensor | None) -> ModuleType | None:
    """The native core, if it is there and all of these lie in the memory of the CPU; else None: PyTorch does it."""
    if any(t is not None and t.device.type != "cpu" for t in tensors):
        return None
    return native.core()


def has_core(device: torch.device) -> bool:
    """Whether the native core works on that device."""
    return device.type == "cpu" and _core_is_there()


def constant(function: Made) -> Made:
    """Its result, for the same arguments, is a constant of what torch.compile makes."""
    # What torch.compiler.assume_constant_result does. That would import all of the compiler, a second at every start.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def _core_is_there() -> bool:
    return native.core() is not None


def at_once(tensor: Tensor) -> bool:
    """Whether PyTorch's operations alone shall do it, all in one go: on accelerators, and in what is being compiled."""
    return tensor.device.type != "cpu" or torch.compiler.is_compiling()


def has_triton(device: torch.device) -> bool:
    """Whether kernels in Triton, and with them compiled PyTorch, run on that device."""
    return device.type in ("cuda", "xpu") and importlib.util.find_spec("triton") is not None


def require_doubles(device: torch.device, what: str) -> None:
    """UsageError where a device has no numbers of 64 bits, which `what` is computed in."""
    if device.type == "mps":
        raise UsageError(f"{what} takes numbers of 64 bits, which mps does not have", where="--device", hint="cpu")


def set_ceiling(device: torch.device, limit: int | None) -> None:
    """No more than `limit` bytes of the device's memory from now on; None: no ceiling.

    Raises:
        UsageError: the CPU, whose ceiling is another one.
        ResourceError: the device does not have as much.
    """
    if limit is None:
        return
    where = "--max-gpu-memory"
    if device.type == "cpu":
        hint = f"--max-memory is for the CPU's; --device says where to work, and there is {', '.join(present())}"
        raise UsageError("nothing is done on an accelerator", where=where, hint=hint)
    total = _total(device)
    if limit > total:
        raise ResourceError(f"{device} has {size_text(total)}, not {size_text(limit)}", where=where)
    _CEILINGS[device.type] = limit
    # PyTorch wants the number of a device here, where it says one; mps has none.
    _module(device.type).set_per_process_memory_fraction(limit / total, *(() if device.index is None else (device,)))


def current(device: torch.device) -> AbstractContextManager[Any]:
    """While it is open, kernels are launched on that device, of several of its kind."""
    found: AbstractContextManager[Any] = nullcontext() if device.type == "cpu" else _module(device.type).device(device)
    return found


def scratch(device: torch.device) -> int:
    """Bytes of temporaries that one step of work may make there."""
    return min(_SCRATCH, _CEILINGS.get(device.type, _PART * _SCRATCH) // _PART)


@contextmanager
def within_memory(device: torch.device) -> Iterator[None]:
    """What runs out of the device's memory ends in words.

    Raises:
        ResourceError: it did.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error).lower():
            raise
        limit = _CEILINGS.get(device.type)
        allowed = "" if limit is None else f", of which {size_text(limit)} are allowed"
        hint = "raise --max-gpu-memory, take fewer tokens or samples at once, or work on the cpu"
        raise ResourceError(f"the memory of {device}{allowed} is not enough", where="--device", hint=hint) from error


def _total(device: torch.device) -> int:
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return int(_module(device.type).get_device_properties(device).total_memory)


def _module(kind: str) -> Any:
    return getattr(torch, kind)
