"""What 8-bit activations would cost, measured while a model is being quantized.

A few samples run through the quantized blocks a second time, with the inputs of every quantized layer rounded to int8
in the basis of its transform, as the int8 kernels do. At the end the output layer turns both streams, and that of the
original model, into distributions: KL with float activations and KL with int8 ones, in nats per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bitfold.calibration.spill import Stream

SAMPLES = 2  # that run beside the others
_TOLERATED = 1.05  # times the KL with float activations: int8 is several times as fast on a CPU
_PIECE = 256  # tokens whose logits exist at a time

Rounding = Callable[[torch.Tensor], torch.Tensor]
Tail = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ActivationCost:
    """KL from the original model in nats per token, with float and with int8 activations."""

    kl_float: float
    kl_int8: float
    tokens: int

    @property
    def choice(self) -> str:
        """int8 where it costs at most a twentieth of what the weights have cost, else float."""
        return "int8" if self.kl_int8 <= _TOLERATED * self.kl_float else "float"


class Probe:
    """The second stream.

    Args:
        inputs: of the first block, each (1, tokens, width); the first SAMPLES of them run with rounded activations.
        into: where they wait for the next block.
    """

    def __init__(self, inputs: Stream, into: Stream) -> None:
        self.hidden = into
        for x in inputs.first(SAMPLES):
            into.append(x)

    @torch.no_grad()
    def advance(
        self,
        block: nn.Module,
        rounding: Mapping[str, Rounding],
        run: Callable[[int, torch.Tensor], torch.Tensor],
        into: Stream,
    ) -> None:
        """Through one quantized block.

        Args:
            block: with its final weights.
            rounding: what each layer's input goes through, by the layer's name in the block.
            run: (number of a sample, its input) -> its output.
            into: takes the outputs.
        """
        handles = [block.get_submodule(name).register_forward_pre_hook(_before(f)) for name, f in rounding.items()]
        try:
            for i, x in enumerate(self.hidden):
                into.append(run(i, x))
            self.hidden = into
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def measure(
        self, original: Iterable[torch.Tensor], quantized: Iterable[torch.Tensor], tail: Tail
    ) -> ActivationCost:
        """Both KLs, from the last block's outputs in the three streams.

        Args:
            original, quantized: (1, tokens, width) for each sample, at least as many as the probe has.
            tail: (1, tokens, width) -> logits (tokens, vocabulary).
        """
        sums, tokens = [0.0, 0.0], 0
        for rounded, truth, plain in zip(self.hidden, original, quantized, strict=False):
            for piece in range(0, truth.shape[1], _PIECE):
                part = slice(piece, piece + _PIECE)
                target = tail(truth[:, part]).float().log_softmax(-1)
                for which, stream in enumerate((plain, rounded)):
                    found = tail(stream[:, part]).float().log_softmax(-1)
                    sums[which] += float((target.exp() * (target - found)).sum())
                tokens += len(target)
        return ActivationCost(sums[0] / tokens, sums[1] / tokens, tokens)


def _before(rounding: Rounding) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounding(inputs[0]), *inputs[1:])

    return hook
