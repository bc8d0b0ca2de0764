"""bitfold in `AutoModel...from_pretrained`: folders of ours, and any checkpoint quantized while it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitfold.checkpoints.schema import QUANT_METHOD, read_entries, stored_name
from bitfold.errors import UsageError
from bitfold.models.hf_saving import PackedWeights
from bitfold.models.opening import untie_stored
from bitfold.models.save import quantization_of
from bitfold.models.sites import Site, find_sites
from bitfold.models.skeleton import retie
from bitfold.models.swap import swap, swap_entries
from bitfold.nn import QWeight
from bitfold.recipes.options import MethodOptions
from bitfold.recipes.recipe import Recipe

if TYPE_CHECKING:
    from bitfold.integrations.while_loading import Packing

_METHOD = tuple(f.name for f in fields(MethodOptions))
_STORED = "tensors"  # what the config of a quantized folder has, and none that asks for a method


class BitfoldConfig(QuantizationConfigMixin):
    """How a model is quantized while it is loaded, or the `quantization_config` of a bitfold folder, word for word.

    `from_pretrained(id, quantization_config=BitfoldConfig(bits=4))` quantizes each tensor as it is read, without data.

    Args:
        bits: see `MethodOptions`.
        said: format, group_size, fit, method, transform, act, prune, ignore, recipe: see `MethodOptions`;
            calibration: text for methods that need it, as `--calibration` takes it: the checkpoint is then quantized
            into a temporary folder first, and loaded from there; seed: of random numbers.

    Raises:
        UsageError: an unknown word.
    """

    def __init__(self, bits: int | None = None, **said: Any) -> None:
        self.quant_method: Any = QUANT_METHOD
        if _STORED not in said:
            if unknown := sorted(set(said) - {*_METHOD, "calibration", "seed"}):
                hint = ", ".join([*_METHOD, "calibration", "seed"])
                raise UsageError(f"{unknown[0]} is no option", where="BitfoldConfig", hint=hint)
            said = {"bits": bits, **said}
        for name, value in said.items():
            setattr(self, name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Take all keys as they are."""
        config = cls(**{k: v for k, v in config_dict.items() if k != "quant_method"})
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it."""
        said: dict[str, Any] = super().to_dict()
        recipe = said.get("recipe")
        return said if recipe is None else said | {"recipe": _in_json(recipe)}

    @property
    def stored(self) -> bool:
        """Whether it describes weights that are quantized already."""
        return hasattr(self, _STORED)

    def wanted(self) -> dict[str, Any]:
        """What is asked for, by the names of `bitfold.quantize`."""
        said = {name: value for name, value in vars(self).items() if name != "quant_method" and value is not None}
        return said | ({"ignore": _patterns(said["ignore"])} if "ignore" in said else {})


def _in_json(recipe: Any) -> Any:
    """Rules as a list, a file by its name."""
    return recipe.to_dict() if isinstance(recipe, Recipe) else recipe if isinstance(recipe, list) else str(recipe)


def _patterns(ignore: Any) -> tuple[str, ...]:
    return (ignore,) if isinstance(ignore, str) else tuple(ignore)


class BitfoldQuantizer(PackedWeights):
    """Swaps quantized layers into the skeleton before transformers loads the weights, or as it loads them."""

    quantization_config: BitfoldConfig
    _packing: Packing | None = None
    _together: Sequence[tuple[str, str]] = ()

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            return model
        config = self.quantization_config.to_dict()
        entries = read_entries(config)
        untie_stored(model, [*entries, *config.get("kept", ())])
        retie(model)
        swap_entries(model, entries)
        tied = model.all_tied_weights_keys
        for alias in [alias for alias, name in tied.items() if name in entries or alias in entries]:
            del tied[alias]  # the layers share one QWeight: there is nothing left to tie
        weights = [(name, module) for name, module in model.named_modules() if isinstance(module, QWeight)]
        self._fields = {f"{name}.{field}": b.dtype for name, w in weights for field, b in w.named_buffers()}
        return model

    def _how(self, model: Any) -> Packing:
        if self.quantization_config.stored:
            what = "describes another folder, and the model to be loaded is not quantized"
            raise UsageError(f"the quantization_config {what}", hint="BitfoldConfig(bits=4)")
        from bitfold.integrations.while_loading import AsItComes, Calibrated

        wanted = self.quantization_config.wanted()
        if "calibration" in wanted:
            where, revision = str(model.config._name_or_path), getattr(model.config, "_commit_hash", None)
            return Calibrated(where, revision, wanted)
        seed = wanted.pop("seed", 0)
        return AsItComes(model, MethodOptions(**wanted), seed)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Decide what becomes of each tensor, when the skeleton is whole and before any is read.

        Not as the skeleton is built: all that is made then is made on the meta device, calibration too. Tensors that
        come out of one of the checkpoint come together.
        """
        given: Any = super()
        found: list[Any] = given.update_weight_conversions(weight_conversions, model)
        if self.pre_quantized:
            return found
        self._sites: dict[str, Site] = {site.tensor: site for site in find_sites(model)}
        self._packing = self._how(model)
        targets = [c.target_patterns for c in found if len(c.target_patterns) > 1]
        self._together = [(first, other) for first, *others in targets for other in others]
        return found

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether it, or what comes out of the same tensor, is quantized while it is loaded."""
        if self._packing is None:
            return False
        together = [param_name.replace(first, other) for first, other in self._together if first in param_name]
        return any(name in self._packing.names for name in (param_name, *together))

    def get_quantize_ops(self) -> ConversionOps:
        """See `_Pack`."""
        return _Pack(self)

    def place(self, model: Any, name: str, w: torch.Tensor) -> dict[str, torch.Tensor]:
        """Make room for a quantized weight in the model; what is to be put there, by name."""
        assert self._packing is not None
        if name not in self._packing.names:
            return {name: w.to(model.get_parameter_or_buffer(name).dtype)}
        entry, stored = self._packing.pack(name, w)
        if entry is None:
            return {name: stored[""].to(w.dtype).to(w.device)}
        swap(model, self._sites[name], entry.meta(), act=entry.act, transform=entry.transform)
        tied = model.all_tied_weights_keys
        for alias in [alias for alias, main in tied.items() if name in (main, alias)]:
            del tied[alias]  # the layers share one QWeight
        return {stored_name(name, field): value.to(w.device) for field, value in stored.items()}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._packing is None:
            return model
        self._packing = None  # and the folder, if it was one
        self.quantization_config = BitfoldConfig.from_dict(quantization_of(model))
        model.config.quantization_config = self.quantization_config
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Fields keep the dtype that the format gives them, whatever the model asks for (T5 wants `wo` in float32)."""
        return self._fields.get(converter.target_patterns[0], dtype)


class _Pack(ConversionOps):
    """Quantizes what transformers read, just before it is put into the model."""

    def __init__(self, quantizer: BitfoldQuantizer) -> None:
        self._quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *patterns: Any, **known: Any) -> Any:
        """Tensors by their names in the model, as fields."""
        found: dict[str, torch.Tensor] = {}
        for name, value in input_dict.items():
            placed = self._quantizer.place(known["model"], name, value[0] if isinstance(value, list) else value)
            if name not in placed:
                known["missing_keys"].discard(name)
            found |= placed
        return found


def register() -> None:
    """Make transformers know `quant_method: bitfold`; harmless when done twice."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(BitfoldConfig)
        register_quantizer(QUANT_METHOD)(BitfoldQuantizer)


register()
