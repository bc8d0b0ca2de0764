"""Register with transformers and PEFT when, and only when, somebody imports them.

`import bitfold` must make `AutoModelForCausalLM.from_pretrained(quantized_folder)` and `get_peft_model` work, and must
not cost the seconds that importing transformers costs. So a finder waits for the modules that know quantizers and
adapters, and registers right after them.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

# A module somebody may import -> our module that registers when it is imported.
_AWAITED = {
    "transformers.quantizers.auto": "bitfold.integrations.transformers",
    "peft.tuners.lora": "bitfold.integrations.peft",
}


class _Loader(importlib.abc.Loader):
    """Runs the real loader, then registers."""

    def __init__(self, real: importlib.abc.Loader) -> None:
        self._real = real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        _register(module.__name__)


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the other finders find the modules, and wraps what they found."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _AWAITED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def install() -> None:
    """Register now with what is loaded, else as soon as it is."""
    for name in _AWAITED:
        if name in sys.modules:
            _register(name)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register(name: str) -> None:
    importlib.import_module(_AWAITED[name])
