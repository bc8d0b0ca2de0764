"""Register with transformers when, and only when, somebody imports its quantizers.

`import bitfold` must make `AutoModelForCausalLM.from_pretrained(quantized_folder)` work, and must not cost the seconds
that importing transformers costs. So a finder waits for `transformers.quantizers.auto` and registers right after it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_AWAITED = "transformers.quantizers.auto"


class _Loader(importlib.abc.Loader):
    """Runs the real loader, then registers."""

    def __init__(self, real: importlib.abc.Loader) -> None:
        self._real = real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        _register()


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the other finders find the module, and wraps what they found."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def install() -> None:
    """Register now if transformers' quantizers are loaded, else as soon as they are."""
    if _AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from bitfold.integrations import transformers

    transformers.register()
