"""A stand-in for the engine's decoder: transformers' model, one text after the other, for families without code."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitfold.models.vocabulary import embedding_rows
from bitfold.serving.protocol import common

_WHOLE = "DynamicLayer"  # how transformers calls keys and values of all positions; others (windows, states) are past
_CACHES = ("cache", "past_key_values")  # what `forward` calls what it keeps, in newer and older releases


class ModuleDecoder:
    """The same verbs as `bitfold.engine.decoder.Decoder`, through the model's own forward pass.

    What the model keeps of a text is used where it can be cut, as keys and values of all positions can; else it serves
    for one more token, and all else is read anew. Where a model keeps nothing the text is read for every token.

    Args:
        model: a causal language model of transformers.
        positions: the longest text.
        sequences: texts that are kept side by side.
    """

    cache_bytes = working_bytes = 0  # they grow with the texts
    guesses = False  # several tokens at a time gain nothing here

    def __init__(self, model: nn.Module, positions: int, sequences: int) -> None:
        self._model: Any = model
        self._caches: list[Any] = [None] * sequences
        known = inspect.signature(model.forward).parameters
        self._name = next((name for name in _CACHES if name in known), None)
        self.positions = positions
        self.vocabulary = int(embedding_rows(model) or model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
        self.texts: list[list[int]] = [[] for _ in range(sequences)]

    def keep(self, ids: Sequence[int], sequence: int = 0) -> int:
        """As `Decoder.keep`."""
        return self._cut(sequence, common(self.texts[sequence], ids))

    def copy(self, source: int, target: int, tokens: int) -> None:
        """As `Decoder.copy`; nothing is copied where it could not be cut."""
        self._caches[target] = copy.deepcopy(self._caches[source])
        self.texts[target] = list(self.texts[source])
        self._cut(target, tokens)

    def step(self, work: Sequence[tuple[int, Sequence[int]]], wanted: Sequence[int] | None = None) -> Tensor:
        """As `Decoder.step`, one row of logits for each."""
        return torch.stack([self._read(sequence, list(ids)) for sequence, ids in work])

    def _cut(self, sequence: int, length: int) -> int:
        cache, text = self._caches[sequence], self.texts[sequence]
        if length < len(text):
            if length and _whole(cache):
                cache.crop(length - len(text))
            else:
                length, self._caches[sequence] = 0, None
        del text[length:]
        return length

    def _read(self, sequence: int, ids: list[int]) -> Tensor:
        text, cache = self.texts[sequence], self._caches[sequence]
        if len(ids) > 1 and not _whole(cache):
            cache = None  # some states take one token at a time
        seen = 0 if cache is None else len(text)
        text += ids
        new = torch.tensor([text[seen:]])
        mask = torch.ones(1, len(text), dtype=torch.int64)
        given = {} if cache is None or self._name is None else {self._name: cache}
        out = self._model(input_ids=new, attention_mask=mask, use_cache=self._name is not None, **given)
        self._caches[sequence] = None if self._name is None else getattr(out, self._name, None)
        logits: Tensor = out.logits[0, -1].float()
        return logits


def _whole(cache: Any) -> bool:
    """Whether it can be cut, and takes several tokens."""
    layers = getattr(cache, "layers", None) or ()
    return bool(layers) and all(type(layer).__name__ == _WHOLE for layer in layers)
