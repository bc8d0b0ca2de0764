"""bitfold folders through `AutoModel...from_pretrained`."""

from __future__ import annotations

from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitfold.checkpoints.schema import QUANT_METHOD, read_entries
from bitfold.models.opening import untie_stored
from bitfold.models.skeleton import retie
from bitfold.models.swap import swap_entries
from bitfold.nn import QWeight


class BitfoldConfig(QuantizationConfigMixin):
    """The `quantization_config` of a bitfold folder, kept word for word."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method: Any = QUANT_METHOD
        for name, value in fields.items():
            setattr(self, name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Take all keys as they are."""
        config = cls(**{k: v for k, v in config_dict.items() if k != "quant_method"})
        return (config, kwargs) if return_unused_kwargs else config


class BitfoldQuantizer(HfQuantizer):
    """Swaps quantized layers into the skeleton before transformers loads the weights."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
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

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Fields keep the dtype that the format gives them, whatever the model asks for (T5 wants `wo` in float32)."""
        return self._fields.get(converter.target_patterns[0], dtype)

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top; the packed weights stay frozen."""
        return True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """`bitfold.save` writes a quantized model; transformers' save_pretrained would not know the tied fields."""
        return False


def register() -> None:
    """Make transformers know `quant_method: bitfold`; harmless when done twice."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(BitfoldConfig)
        register_quantizer(QUANT_METHOD)(BitfoldQuantizer)


register()
