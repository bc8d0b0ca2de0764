"""Predictions by the native engine, for quantized models that it runs with float activations.

Their layers cost transformers' loop more than they cost the engine, whose threads share out attention and norms as
well. Keys and values are in half precision: a KL of 1e-6 to 1e-5 nats. Models that nobody quantized stay with
PyTorch's products, which are as fast; those with activations in 8 bits, too: where a sum is a rounding error away from
the next step, the two ways round apart, and the perplexity of a small model moves by some .4 %.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from bitfold.engine.decoder import CHUNK, Decoder, Unsupported
from bitfold.nn import QWeight
from bitfold.system import progress
from bitfold.transforms.activations import read_act

_LOGIT_BYTES = 1 << 27  # of the tokens that are read at once
_FEWEST = 16  # of them


class Rows(Protocol):
    """Logits of a window of the batch."""

    def __call__(self, row: int, start: int, stop: int) -> torch.Tensor: ...


class ByEngine:
    """Reads windows from left to right and hands out their logits.

    Args:
        decoder: with room for a window.
        piece: rows that are asked for at once.
    """

    def __init__(self, decoder: Decoder, piece: int) -> None:
        self._decoder = decoder
        most = min(CHUNK, max(_FEWEST, _LOGIT_BYTES // (4 * decoder.vocabulary)))
        self._chunk = max(piece, most // piece * piece)

    @contextmanager
    def run(self, ids: torch.Tensor) -> Iterator[Rows]:
        """A function (row of `ids`, start, stop) -> float32 logits (stop - start, vocabulary); places only go up."""
        decoder, logits = self._decoder, torch.empty(0, self._decoder.vocabulary)
        window, first = -1, 0

        def rows(row: int, start: int, stop: int) -> torch.Tensor:
            nonlocal logits, window, first
            if row != window:
                window, first = row, start
                decoder.ids.clear()
                if start:
                    decoder.extend(ids[row, :start].tolist())
                logits = logits[:0]
            while stop > first + len(logits):
                read = len(decoder.ids)
                kept = logits[start - first :]
                first = start
                logits = torch.cat([kept, decoder.logits(ids[row, read : read + self._chunk].tolist())])
            return logits[start - first : stop - first]

        yield rows


def by_engine(model: nn.Module, context: int, piece: int) -> ByEngine | None:
    """The engine for a model in windows of `context` tokens; None for what it is not meant for, or does not run."""
    weights = [m for m in model.modules() if isinstance(m, QWeight)]
    if not weights or any(_rounds(weight) for weight in weights):
        return None
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return None  # somebody looks on
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters()):
        return None  # the engine computes in float32, and that is not what was asked for
    try:
        decoder = Decoder(model, context, cache="f16")
    except Unsupported:
        return None
    progress.say("predictions come from the native engine, with keys and values in half precision")
    return ByEngine(decoder, piece)


def _rounds(weight: Any) -> bool:
    act = read_act(weight.act)
    return act.kernel != "float" or act.static or act.threshold is not None
