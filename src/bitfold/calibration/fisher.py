"""Token weights: how much the loss cares about the output of a layer at each token.

The gradient of the cross entropy, with labels drawn from the model's own predictions, gives the diagonal of the Fisher
information; its square, averaged over the outputs of a layer, weights the tokens in that layer's Hessian (GuidedQuant,
Kim et al. 2025, with one group of rows). One forward and one backward pass over the calibration text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bitfold import progress

_LARGEST = 50.0  # times the mean: a single token must not be the whole Hessian


def token_weights(
    model: nn.Module, names: Iterable[str], ids: torch.Tensor, *, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Weights (samples, seqlen), float32 with mean 1, for each named layer.

    Args:
        model: a causal language model, whole, in float32.
        names: paths of its layers.
        ids: token ids (samples, seqlen).
        seed: of the labels.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def hook(name: str) -> Any:
        def keep(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
            sums[name].append(outputs[0].detach().float().square().mean(-1).reshape(-1))

        return keep

    handles = [model.get_submodule(name).register_full_backward_hook(hook(name)) for name in sums]
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        with torch.enable_grad(), progress.bar("weigh tokens", len(ids)) as bar:
            for sample in ids:
                _backward(model, sample, generator)
                bar.advance(1)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _normalised(parts, ids) for name, parts in sums.items() if parts}


def _backward(model: Any, sample: torch.Tensor, generator: torch.Generator) -> None:
    inputs = model.get_input_embeddings()(sample[None]).detach().requires_grad_(True)
    logits = model(inputs_embeds=inputs, use_cache=False).logits[0].float()
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    loss: Any = nn.functional.cross_entropy(logits, labels, reduction="sum")
    loss.backward()


def _normalised(parts: list[torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    weights = torch.cat(parts).view(ids.shape)
    weights = weights / weights.mean().clamp_min(1e-30)
    return weights.clamp(max=_LARGEST)
