"""Catch what every block of a list is called with, their work left out.

Masks and rotary embeddings may differ from block to block (sliding windows), so all blocks are called; each hands on
what it was given. What comes before the blocks is filled as far as the text needs it, and nothing after them is run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from bitfold.calibration.calls import Call, shared, with_activations, without
from bitfold.calibration.embedded import Filled, Tensors
from bitfold.calibration.rehearsal import text_inputs
from bitfold.calibration.shape import BlockShape, ChainShape
from bitfold.calibration.spill import Stream
from bitfold.errors import ModelError
from bitfold.models.eager_experts import one_expert_at_a_time


class Stop(Exception):
    """Raised by a hook when the rest of a forward pass is not needed."""


class Catcher:
    """Of one list of blocks.

    Args:
        model: on the meta device.
        chain: the list.
        ids: token ids (samples, seqlen).
    """

    def __init__(self, model: nn.Module, chain: ChainShape, ids: torch.Tensor) -> None:
        self._model, self._chain, self._ids = model, chain, ids
        self._blocks = [model.get_submodule(block.path) for block in chain.blocks]

    @torch.no_grad()
    def catch(self, source: Tensors, stream: Stream) -> list[list[Call]]:
        """For each block, for each sample: what it is called with; activations that enter the first one go to `stream`.

        Raises:
            ModelError: the blocks are not called as they were in the rehearsal.
        """
        one_expert_at_a_time(self._model)
        calls: list[list[Call]] = [[] for _ in self._blocks]
        shapes: list[list[torch.Size]] = [[] for _ in self._blocks]

        def caught(number: int, shape: BlockShape) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                x, call = without(args, kwargs, shape.place)
                if number == 0:
                    stream.append(x)
                calls[number].append(shared(call, calls[number]))
                shapes[number].append(x.shape)
                if number == len(calls) - 1:
                    raise Stop
                return shape.answering(x)

            return forward

        model: Any = self._model
        with Filled(model, source, self._ids, skip=f"{self._chain.path}."), self._answering(caught):
            for sample in self._ids:
                with contextlib.suppress(Stop):
                    model(**text_inputs(model, sample[None]))
        if any(found != shapes[0] for found in shapes) or len(shapes[0]) != len(self._ids):
            raise ModelError("its blocks are not called one after the other", where=type(model).__name__)
        return calls

    @torch.no_grad()
    def tail(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (tokens, vocabulary) of the last block's output (1, tokens, width): the blocks themselves left out."""
        model: Any = self._model
        ids = self._ids[:1, : hidden.shape[1]]
        with self._answering(lambda _number, shape: lambda *_args, **_kwargs: shape.answering(hidden)):
            logits: torch.Tensor = model(**text_inputs(model, ids)).logits
        return logits[0]

    def behind(self, source: Tensors, stream: Stream, layer: str) -> Iterator[torch.Tensor]:
        """What enters a layer behind the blocks, sample by sample, where they hand on what is in the stream."""
        model: Any = self._model
        caught: list[torch.Tensor] = []

        def catch(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            caught.append(inputs[0])
            raise Stop

        handle = model.get_submodule(layer).register_forward_pre_hook(catch)  # before it would be filled
        try:
            with Filled(model, source, self._ids, skip=f"{self._chain.path}."):
                for sample, hidden in zip(self._ids, stream, strict=True):
                    self._run_behind(sample, hidden)
                    yield caught.pop()
        finally:
            handle.remove()

    def _run_behind(self, sample: torch.Tensor, hidden: torch.Tensor) -> None:
        model: Any = self._model
        answers = self._answering(lambda _number, shape: lambda *_args, **_kwargs: shape.answering(hidden))
        with torch.no_grad(), answers, contextlib.suppress(Stop):
            model(**text_inputs(model, sample[None]))

    @contextlib.contextmanager
    def _answering(self, forward: Callable[[int, BlockShape], Callable[..., Any]]) -> Iterator[None]:
        """Every block answers at once, as `forward` of its number and shape says."""
        try:
            for number, (block, shape) in enumerate(zip(self._blocks, self._chain.blocks, strict=True)):
                block.__dict__["forward"] = forward(number, shape)
            yield
        finally:
            for block in self._blocks:
                block.__dict__.pop("forward", None)


def run_block(block: nn.Module, shape: BlockShape, call: Call, x: torch.Tensor) -> torch.Tensor:
    """The activations that a block hands on."""
    args, kwargs = with_activations(call, shape.place, x)
    return shape.handed_on(block(*args, **kwargs))
