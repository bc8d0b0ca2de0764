"""Parts of a block that are finished need not be run again: what they answer is written down once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from bitfold.calibration.spill import Answers, Spill


class AnswerReplay:
    """Parts of a block (its attention, say) whose layers are all quantized: run once more, then their answers repeated.

    Samples always come in the same order, so an answer is found by counting.

    Args:
        block: the block.
        groups: its groups of layers, in the order in which they are quantized.
        samples: how many there are.
        spill: where the answers wait.
    """

    def __init__(self, block: nn.Module, groups: list[list[str]], samples: int, spill: Spill) -> None:
        last = {layer.split(".")[0]: number for number, group in enumerate(groups) for layer in group if "." in layer}
        self._parts = {part: block.get_submodule(part) for part in last}
        self._ready = {part: number + 1 for part, number in last.items()}
        self._outputs = {part: Answers(spill.scratch()) for part in last}
        self._samples = samples

    def replay(self, groups: int) -> None:
        """Before each pass over the samples, with that many groups quantized."""
        self.forget()
        for part, child in self._parts.items():
            outputs = self._outputs[part]
            if groups >= self._ready[part]:
                # Called more than once a sample, or cut short: never repeated.
                complete = len(outputs) == self._samples
                child.__dict__["forward"] = _player(outputs) if complete else _recorder(child.forward, outputs)

    def close(self) -> None:
        """Run everything for real from now on."""
        self.forget()
        for outputs in self._outputs.values():
            outputs.clear()

    def forget(self) -> None:
        """Run everything for real again."""
        for part, child in self._parts.items():
            child.__dict__.pop("forward", None)
            if len(self._outputs[part]) != self._samples:
                self._outputs[part].clear()


def _recorder(forward: Callable[..., Any], outputs: Answers) -> Callable[..., Any]:
    def record(*args: Any, **kwargs: Any) -> Any:
        answer = forward(*args, **kwargs)
        outputs.append(answer)
        return answer

    return record


def _player(outputs: Answers) -> Callable[..., Any]:
    following = iter(outputs)
    return lambda *_args, **_kwargs: next(following)
