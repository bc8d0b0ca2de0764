"""bitfold folds the weights of neural networks into few bits.

It picks the codes, packs them, stores them, runs them and proves what was lost. The public names are imported when they
are first used, so that `import bitfold` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bitfold.integrations import hook as _hook
from bitfold.version import __version__

_PUBLIC = {
    "pack": "bitfold.formats.packing",
    "unpack": "bitfold.formats.packing",
    "quantize_tensor": "bitfold.methods.quantize",
    "FORMATS": "bitfold.formats",
    "QTensor": "bitfold.qtensor",
    "quantize_": "bitfold.models.swap",
    "quantize": "bitfold.run.driver",
    "load": "bitfold.models.load",
    "save": "bitfold.models.save",
    "evaluate": "bitfold.evaluation",
    "Calibration": "bitfold.calibration.session",
    "Distillation": "bitfold.training.options",
    "distill": "bitfold.training.distill",
    "prepare_qat": "bitfold.training.qat",
    "convert_qat": "bitfold.training.qat",
    "kl_loss": "bitfold.training.losses",
    "Recipe": "bitfold.recipes.recipe",
    "Rule": "bitfold.recipes.recipe",
    "nn": "bitfold.nn",
    "errors": "bitfold.errors",
}

if TYPE_CHECKING:
    from bitfold import errors, nn
    from bitfold.calibration.options import Calibration
    from bitfold.evaluation import evaluate
    from bitfold.formats import FORMATS
    from bitfold.formats.packing import pack, unpack
    from bitfold.methods.quantize import quantize_tensor
    from bitfold.models.load import load
    from bitfold.models.save import save
    from bitfold.models.swap import quantize_
    from bitfold.qtensor import QTensor
    from bitfold.recipes.recipe import Recipe, Rule
    from bitfold.run.driver import quantize
    from bitfold.training.distill import distill
    from bitfold.training.losses import kl_loss
    from bitfold.training.options import Distillation
    from bitfold.training.qat import convert_qat, prepare_qat

__all__ = [
    "FORMATS",
    "Calibration",
    "Distillation",
    "QTensor",
    "Recipe",
    "Rule",
    "__version__",
    "convert_qat",
    "distill",
    "errors",
    "evaluate",
    "kl_loss",
    "load",
    "nn",
    "pack",
    "prepare_qat",
    "quantize",
    "quantize_",
    "quantize_tensor",
    "save",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bitfold' has no attribute {name!r}")
    module = import_module(_PUBLIC[name])
    value = module if name in ("nn", "errors") else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


_hook.install()
