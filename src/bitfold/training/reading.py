"""How teacher and student read a window: the last hidden states of all its tokens, the logits of some at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from bitfold.calibration.rehearsal import text_inputs
from bitfold.calibration.tail import FEW, Tail

_MOST = 512  # tokens whose logits exist at a time: fewer, and the head spends its time on arranging its weights anew
Loss = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]  # logits of some tokens -> loss, gradient
_LOGITS = 1 << 26  # that exist at a time at most, however many words there are


def tokens_together(words: int) -> int:
    """Tokens whose logits exist at a time, of a vocabulary of so many words."""
    return max(1, min(_MOST, _LOGITS // max(1, words)))


class Reading:
    """Of one model.

    Args:
        model: a causal language model.
    """

    def __init__(self, model: nn.Module) -> None:
        text: Any = model
        self.model, embedding = text, text.get_input_embeddings()
        self.words = int(embedding.weight.shape[0])
        self._tail = Tail.of(model, torch.arange(1, 1 + FEW)[None] % self.words)

    def states(self, ids: torch.Tensor) -> Any:
        """What comes before the logits of all tokens but the last, of ids (tokens,): hidden states (1, tokens - 1,
        width); the logits themselves where these are not made token by token."""
        if self._tail is not None:
            return self._tail.hidden(ids[None])[:, :-1]
        return self.model(**text_inputs(self.model, ids[None])).logits[:, :-1]

    def pieces(self, ids: torch.Tensor) -> Iterator[slice]:
        """Ranges of the tokens but the last, whose logits may exist together."""
        count, size = len(ids) - 1, tokens_together(self.words)
        return (slice(at, min(at + size, count)) for at in range(0, count, size))

    def logits(self, states: torch.Tensor, ids: torch.Tensor) -> Any:
        """Of some states (1, tokens, width) and the ids (tokens,) there: (tokens, vocabulary)."""
        return states[0] if self._tail is None else self._tail.logits(states, ids[None])[0]

    def mean(
        self, states: torch.Tensor, ids: torch.Tensor, loss: Loss, share: float | None
    ) -> tuple[float, torch.Tensor | None]:
        """Mean loss of the predictions of a window, and its gradient by the states, a few tokens at a time.

        Args:
            states: of `states`.
            ids: int64 (tokens,).
            loss: of float32 logits (some, vocabulary), which are its own, and which tokens these are: a loss for each,
                and the gradient of each by its logits.
            share: the gradient grows by so many times; None = no gradient is wanted.
        """
        total, count = 0.0, len(ids) - 1
        gradients = None if share is None else torch.empty_like(states)
        for some in self.pieces(ids):
            # Strides of a slice would stay, and make the head copy its weights into another order for each product.
            part = states.detach()[:, some].clone(memory_format=torch.contiguous_format)
            part.requires_grad_(share is not None)
            logits = self.logits(part, ids[some])
            found, gradient = loss(logits.detach().to(torch.float32, copy=True), some)
            total += float(found.sum(dtype=torch.float64))
            if gradients is not None and share is not None:
                logits.backward(gradient.mul_(share / count).to(logits.dtype))
                assert part.grad is not None
                gradients[:, some] = part.grad
        self.forget()
        return total / count, gradients

    def forget(self) -> None:
        """The states are not needed any more."""
        if self._tail is not None:
            self._tail.forget()
