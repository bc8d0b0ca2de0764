"""Gradients of a language model in little memory: its logits a few tokens at a time, its blocks run once more."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bitfold.calibration.rehearsal import text_inputs

FEW = 8  # tokens on which the output layer is looked at
_CHUNK = 128  # tokens whose logits exist at a time
_LOGITS = 1 << 24  # that exist at a time at most, however many words there are


def tokens_at_once(words: int) -> int:
    """Tokens whose logits exist at a time, of a vocabulary of so many words."""
    return max(1, min(_CHUNK, _LOGITS // max(1, words)))


@contextlib.contextmanager
def recomputed(model: nn.Module, blocks: Iterable[str]) -> Iterator[None]:
    """The backward pass runs each block forward once more instead of finding its activations in memory."""
    modules = [model.get_submodule(path) for path in blocks]

    def again(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)

    try:
        for block in modules:
            block.__dict__["forward"] = again(block.forward)
        yield
    finally:
        for block in modules:
            block.__dict__.pop("forward", None)


class Tail:
    """What a model makes of the last hidden states, token by token: scaling, soft caps and all.

    Args:
        model: with its base model and what follows it.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._base = model, model.base_model
        self._answer: Any = None
        self.heard = False

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, ids: torch.Tensor) -> Tail | None:
        """Of a model, tried on a few tokens; None if its logits are not made so."""
        if model.base_model is model:
            return None
        tail = cls(model)
        hidden, few = tail.hidden(ids), ids.shape[1] // 2
        if not isinstance(hidden, torch.Tensor) or hidden.shape[:2] != ids.shape:
            return None
        whole = model(**text_inputs(model, ids)).logits
        part = tail.logits(hidden[:, :few], ids[:, :few])
        if not tail.heard:  # the model goes past its base model to a part of it
            return None
        about = max(1e-3, 2 * torch.finfo(whole.dtype).eps)  # products of few rows are rounded in another order
        close = part.shape == whole[:, :few].shape and torch.allclose(part, whole[:, :few], rtol=about, atol=about)
        return tail if close else None

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """The last hidden states (1, tokens, width)."""
        self._answer = self._base(**text_inputs(self._model, ids))
        found: torch.Tensor = self._answer[0]
        return found

    def logits(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Of some of them (1, tokens, vocabulary)."""
        known = self._answer
        if isinstance(known, tuple):
            replaced: Any = (hidden, *known[1:])
        else:
            replaced = type(known)(**{**known, next(iter(known)): hidden})

        def answer_again(*_args: Any, **_kwargs: Any) -> Any:
            self.heard = True
            return replaced

        try:
            self._base.__dict__["forward"] = answer_again
            logits: torch.Tensor = self._model(**text_inputs(self._model, ids)).logits
            return logits
        finally:
            self._base.__dict__.pop("forward", None)

    def forget(self) -> None:
        """What the base model answered is not needed any more."""
        self._answer = None
