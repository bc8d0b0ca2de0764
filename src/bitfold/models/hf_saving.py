"""transformers' own `save_pretrained` and `push_to_hub` on models with quantized weights: they write bitfold folders.

transformers asks the `hf_quantizer` of a model what its state dict is; a model that holds packed weights has this one,
wherever the weights come from. Imported only where transformers is there already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from bitfold.checkpoints.schema import QUANT_METHOD
from bitfold.models.save import quantization_of, stored_of


class PackedWeights(HfQuantizer):
    """What transformers has to know of a model with packed weights."""

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """They are written field by field, under the names of the model, with what they mean in config.json."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top; the packed weights stay frozen."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """What stays in floating point can be trained as it is; `Trainer` would not even evaluate the model else."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The fields and the plain tensors of a model, and its config that says what they mean."""
        model.config.quantization_config = quantization_of(model)
        model._weight_conversions = []  # fields have the names of the model, not those of some older checkpoint
        return {name: _alone(tensor) for name, tensor in stored_of(model).items()}, {}


class PackedSettings:
    """The least that transformers reads of a quantizer's config."""

    quant_method = QUANT_METHOD


def give_saving(model: nn.Module, path: str) -> None:
    """Let transformers save a model, and those of its parts on the way to `path` that can be saved by themselves."""
    from transformers.modeling_utils import PreTrainedModel  # it imports us, when it is imported first

    steps = path.split(".") if path else []
    for depth in range(len(steps) + 1):
        part = model.get_submodule(".".join(steps[:depth]))
        if isinstance(part, PreTrainedModel) and getattr(part, "hf_quantizer", None) is None:
            settings: Any = PackedSettings()
            vars(part)["hf_quantizer"] = PackedWeights(settings)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """In memory of its own: transformers takes tensors that share some (two of one mapped file) for tied."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()
