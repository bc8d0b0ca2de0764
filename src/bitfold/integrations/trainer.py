"""transformers' Trainer with a teacher: the loss is the KL divergence to what that one predicts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from bitfold.training.losses import kl_loss


class KlTrainer(Trainer):  # type: ignore[misc,unused-ignore]
    """A `Trainer` whose model learns from a teacher's predictions, not from labels.

    Args:
        teacher: a model with the same vocabulary, packed or not; it is not trained.
        temperature: see `kl_loss`.
        arguments, options: of transformers' `Trainer`.
    """

    def __init__(self, *arguments: Any, teacher: nn.Module, temperature: float = 1.0, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.teacher: Any = teacher.eval().requires_grad_(False)
        self.temperature = temperature

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean KL(teacher || model) over the tokens that the attention mask counts; labels are not looked at."""
        asked = {key: value for key, value in inputs.items() if key != "labels"}
        with torch.no_grad():
            wanted = self.teacher(**asked).logits
        outputs = model(**asked)
        loss = kl_loss(outputs.logits, wanted, asked.get("attention_mask"), self.temperature)
        return (loss, outputs) if return_outputs else loss
