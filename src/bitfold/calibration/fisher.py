"""Token weights: how much the loss cares about the output of a layer at each token.

The gradient of the cross entropy, with labels drawn from the model's own predictions, gives the diagonal of the Fisher
information; its square, averaged over the outputs of a layer, weights the tokens in that layer's Hessian (GuidedQuant,
Kim et al. 2025, with one group of rows). One label a token is a noisy look at it, and a few heavy tokens make a noisy
Hessian: the weights here are the square roots of those, which loses less (docs/log.md). One forward and one backward
pass over the calibration text; a block's activations exist only while the backward pass is in it (they are computed
again), so that memory holds those of one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bitfold.calibration.walk import find_blocks
from bitfold.system import progress

_POWER = 0.5  # of the squared gradients
_LARGEST = 50.0  # times the mean: a single token must not be the whole Hessian
_CHUNK = 128  # tokens whose logits exist at a time
_FEW = 8  # tokens on which the output layer is looked at


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
    # Made before the work: small results between the large temporaries of a pass would pin the memory of every window.
    found = {name: torch.zeros(ids.shape) for name in names}
    heard: set[str] = set()
    at = 0

    def note(name: str, gradient: torch.Tensor) -> None:
        heard.add(name)
        found[name][at] = gradient.float().square().mean(-1).reshape(-1)

    def listen(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            # A hook of the tensor, not a backward hook of the module: that one would keep the output alive.
            if output.requires_grad:
                output.register_hook(partial(note, name))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(listen(name)) for name in found]
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        with torch.enable_grad(), _recomputed(model), progress.bar("weigh tokens", len(ids)) as bar:
            head = _head(model, ids[0])
            for number, sample in enumerate(ids):
                at = number
                _backward(model, head, sample, generator)
                bar.advance(1)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _normalised(found[name]) for name in found if name in heard}


@contextlib.contextmanager
def _recomputed(model: nn.Module) -> Iterator[None]:
    """The backward pass runs each block forward once more instead of finding its activations in memory."""
    _, blocks = find_blocks(model)

    def again(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)

    try:
        for block in blocks:
            block.__dict__["forward"] = again(block.forward)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _head(model: Any, sample: torch.Tensor) -> Any:
    """The output layer, if the logits are just what it makes of the last hidden state (no scaling, no soft cap)."""
    head, base = model.get_output_embeddings(), model.base_model
    if head is None or base is model:
        return None
    few = sample[None, :_FEW]
    with torch.no_grad():
        logits = model(input_ids=few, use_cache=False).logits
        hidden = base(input_ids=few, use_cache=False)[0]
    return head if torch.equal(logits, head(hidden)) else None


def _backward(model: Any, head: Any, sample: torch.Tensor, generator: torch.Generator) -> None:
    inputs = model.get_input_embeddings()(sample[None]).detach().requires_grad_(True)
    if head is None:
        logits = model(inputs_embeds=inputs, use_cache=False).logits[0]
        logits.backward(_surprise(logits.detach(), generator))
        return
    # The logits of a window can be larger than the model; a few tokens at a time they stay in the cache.
    hidden = model.base_model(inputs_embeds=inputs, use_cache=False)[0]
    with torch.no_grad():
        parts = [_surprise(head(part), generator) @ head.weight for part in hidden[0].split(_CHUNK)]
    hidden.backward(torch.cat(parts)[None])


def _surprise(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gradient of the summed cross entropy by the logits (tokens, vocabulary), labels drawn from them: p - label."""
    p = logits.float().softmax(-1)
    labels = torch.multinomial(p, 1, generator=generator)
    return p.scatter_add_(1, labels, torch.full_like(labels, -1.0, dtype=p.dtype)).to(logits.dtype)


def _normalised(weights: torch.Tensor) -> torch.Tensor:
    weights = weights.pow(_POWER)
    weights = weights / weights.mean().clamp_min(1e-30)
    return weights.clamp(max=_LARGEST)
