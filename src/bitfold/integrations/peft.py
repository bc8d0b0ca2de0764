"""Adapters of PEFT on quantized layers: QLoRA on any format (Dettmers et al. 2023, arXiv 2305.14314).

The packed weights stay frozen and packed: gradients flow through them to the activations by decoding some rows at a
time in the backward pass, and nothing dequantized is kept between the passes. PEFT takes custom layer types from each
`LoraConfig` (`_register_custom_module`, its hook for layers that it does not know); `register` has every config bring
ours along, so that `get_peft_model`, `PeftModel.from_pretrained` and `model.add_adapter` find them.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from peft.tuners import tuners_utils
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraConfig, LoraLayer
from peft.utils import integrations
from torch import nn

from bitfold.errors import UsageError
from bitfold.nn import QLinear, QWeight

_INITS = (True, False, "gaussian")  # the others read or rewrite the weight of the base


class QLoraLinear(LoraLinear):
    """A quantized linear layer with LoRA adapters beside it: y = base(x) + scaling * B(A(dropout(x)))."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA; the variants (DoRA and others) read or rewrite the weight of the base."""
        return {(): None}

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        base: Any = module
        return base.in_features, base.out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter; UsageError for one that would need the weight of the base in floating point."""
        if config.init_lora_weights not in _INITS:
            raise UsageError(
                f"init_lora_weights={config.init_lora_weights!r} would rewrite the quantized weight",
                hint="True or 'gaussian'",
            )
        try:
            super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
        except ValueError as error:
            if "variant combination" not in str(error):
                raise
            raise UsageError(f"on quantized layers only plain LoRA: {error}") from error

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """UsageError: the sum of packed weights and an adapter would have to be rounded again."""
        raise UsageError(
            "an adapter cannot be merged into packed weights without rounding them again",
            hint="`bitfold merge BASE ADAPTER --data TEXT -o OUT` does that; or keep the adapter beside them",
        )


def register() -> None:
    """Make every LoraConfig know quantized layers, "all-linear" included; harmless when done twice."""
    config: Any = LoraConfig
    original = config.__post_init__
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def with_ours(self: Any) -> None:
        original(self)
        self._register_custom_module({QLinear: QLoraLinear})

    config.__post_init__ = with_ours
    _include_in_all_linear()
    _dequantize_where_it_is_read()


def _dequantize_where_it_is_read() -> None:
    """DoRA and others read the weight of the base by a helper that takes a tensor, and know it by that name."""
    original = integrations.dequantize_module_weight

    @functools.wraps(original)
    def with_ours(module: Any) -> Any:
        weight = module.weight
        return weight.dequantize() if isinstance(weight, QWeight) else original(module)

    for module in [m for name, m in sys.modules.items() if name.startswith("peft.")]:
        if vars(module).get("dequantize_module_weight") is original:
            vars(module)["dequantize_module_weight"] = with_ours


def _include_in_all_linear() -> None:
    """PEFT's shorthand knows nn.Linear by its class only."""
    original = tuners_utils._maybe_include_all_linear_layers

    @functools.wraps(original)
    def with_ours(peft_config: Any, model: nn.Module) -> Any:
        wanted = getattr(peft_config, "target_modules", None)
        config: Any = original(peft_config, model)
        if isinstance(wanted, str) and wanted.lower() == "all-linear" and isinstance(peft_config, LoraConfig):
            config.target_modules |= _quantized_linears(model)
        return config

    tuners_utils._maybe_include_all_linear_layers = with_ours


def _quantized_linears(model: Any) -> set[str]:
    """Names of the quantized linear layers that bear no adapter yet, the output head aside."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inside = {id(m.get_base_layer()) for m in model.modules() if isinstance(m, LoraLayer)}
    found = ((name, m) for name, m in model.named_modules() if isinstance(m, QLinear))
    return {name for name, m in found if m is not head and id(m) not in inside}


register()
