"""The native core, if there is one.

Everything in bitfold works without it, through PyTorch and with the same numbers: a machine without a C++ compiler, or
a CPU nobody has seen yet, loses speed and nothing else. The loss is said once.

Environment:
    BITFOLD_NATIVE=0        act as if the core were not there (tests use it to compare both paths).
    BITFOLD_ISA=NAME        use this set: scalar, avx2, avx512, amx, neon, neon_i8mm. An error if it is not available.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType

import torch

from bitfold.errors import UsageError


@functools.cache
def _load() -> ModuleType | None:
    try:
        module = importlib.import_module("bitfold._native")
    except ImportError as error:
        warnings.warn(
            f"bitfold runs without its native core ({error}): the same numbers through PyTorch, slower. "
            "A C++17 compiler and `pip install --force-reinstall bitfold` bring it back.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    forced = os.environ.get("BITFOLD_ISA", "")
    if not module.set_isa(forced):
        raise UsageError(
            f"the instruction set {forced!r} is not available here",
            where="BITFOLD_ISA",
            hint=f"one of: {', '.join(module.isas())}",
        )
    return module


def core() -> ModuleType | None:
    """The compiled module `bitfold._native`, or None.

    Raises:
        UsageError: BITFOLD_ISA names an instruction set that this build or CPU lacks.
    """
    return None if os.environ.get("BITFOLD_NATIVE") == "0" else _load()


def threads() -> int:
    """Threads that native code may use: those that the user has given PyTorch."""
    return torch.get_num_threads()
