"""Runs of a module over all samples, to hear what enters its layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from bitfold.calibration.additions import OUTPUT
from bitfold.calibration.catcher import Stop
from bitfold.calibration.experts import Listener
from bitfold.calibration.statistics import WINDOWS, Statistics, Sums, Wanted

HESSIANS = 2 << 30  # bytes of the Hessians of experts in memory at a time, where there is room
SUMMED = 8  # bytes of a number of a Hessian while it is summed
Passes = Callable[[], Iterator[object]]  # a pass over all samples, one at each step: what the module answered


class Runner:
    """Of a block, or of a whole model.

    Args:
        module: with its weights in memory.
        passes: begins a pass over the samples; each step is one of them, and may be cut short by `Stop`.
        hessian_bytes: bytes of the Hessians of experts in memory at a time.
    """

    def __init__(self, module: nn.Module, passes: Passes, hessian_bytes: int) -> None:
        self._module, self._passes, self._hessian_bytes = module, passes, hessian_bytes

    def groups(self, layers: Sequence[str], stacks: Sequence[str]) -> list[list[str]]:
        """Layers in the order of their execution, those with the very same input together, idle ones left out.

        One sample is enough unless tokens are sent to some layers only.
        """
        order: list[tuple[str, int]] = []
        alive: list[torch.Tensor] = []  # keeps the inputs, so that no two of them get the same address

        def note(name: str, x: torch.Tensor) -> None:
            alive.append(x)
            order.append((name, x.data_ptr() if name in layers else -len(order) - 1))

        handles = [self._module.get_submodule(n).register_forward_pre_hook(_noter(note, n)) for n in layers]
        with Listener(self._module, stacks, lambda name, _expert, x: note(name, x)):
            for _ in self._passes():
                if {name for name, _ in order}.issuperset([*layers, *stacks]):
                    break
        for handle in handles:
            handle.remove()
        groups: dict[int, list[str]] = {}
        for name, address in order:
            if not any(name in group for group in groups.values()):
                groups.setdefault(address, []).append(name)
        return list(groups.values())

    def measure(
        self,
        layer: str,
        sums: Sums,
        original: Callable[[int], torch.Tensor | None] | None = None,
        weight: torch.Tensor | None = None,
        *,
        closing: bool = True,
        place: str | None = None,
    ) -> None:
        """Sum over the inputs of a layer.

        Args:
            layer: its name in the module.
            sums: takes them.
            original: the same inputs in the original model, by the number of the sample; or what is at the place there.
            weight: of the tokens (samples, tokens).
            closing: whether groups of windows are closed; else what was heard is for `Sums.part`.
            place: where the layer's output is added, if the deficit of that sum is to be known; see `sums_behind`.
        """
        found, reached = list[torch.Tensor](), list[torch.Tensor]()

        def enter(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            found.append(_by_token(inputs[0]))
            if place is None:
                raise Stop

        def arrive(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            reached.append(_by_token(inputs[0]))
            raise Stop

        handles = [self._module.get_submodule(layer).register_forward_pre_hook(enter)]
        if place:
            handles.append(self._module.get_submodule(place).register_forward_pre_hook(arrive))
        try:
            for i, answer in enumerate(self._passes()):
                if found:  # an expert may be idle
                    before, of_tokens = None if original is None else original(i), None
                    if weight is not None:
                        of_tokens = weight[i].reshape(-1, 1)
                    if place == OUTPUT and isinstance(answer, torch.Tensor):
                        reached.append(_by_token(answer))
                    if place is None or before is None:
                        sums.add(found.pop(), before, of_tokens)
                    else:
                        now = reached.pop()
                        sums.add(found.pop(), None, of_tokens, _by_token(before).to(now.device) - now)
                if closing and i % WINDOWS == WINDOWS - 1:
                    sums.close()
        finally:
            for handle in handles:
                handle.remove()

    def measure_together(self, sums: dict[str, Sums], weights: dict[str, torch.Tensor]) -> None:
        """Of the inputs of several layers in one pass, which goes to its end."""
        at = 0

        def adder(layer: str) -> Callable[..., None]:
            def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                weight = weights.get(layer)
                x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
                sums[layer].add(x, None, None if weight is None else weight[at].reshape(-1, 1))
                sums[layer].close()

            return hook

        handles = [self._module.get_submodule(n).register_forward_pre_hook(adder(n)) for n in sums]
        try:
            for _ in self._passes():
                at += 1
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def measure_experts(self, stack: str, shape: Sequence[int]) -> Iterator[Statistics]:
        """One for each expert when it is asked for, a few experts at a time where their Hessians take much memory.

        The module must not change in between.

        Args:
            stack: name of the parameter.
            shape: (experts, n, k), whatever the module keeps them as.
        """
        at_once = max(1, self._hessian_bytes // (SUMMED * max(shape[1:]) ** 2))
        for first in range(0, shape[0], at_once):
            sums = {e: Sums(shape[1:], Wanted(cross=False)) for e in range(first, min(first + at_once, shape[0]))}

            def heard(_name: str, expert: int, x: torch.Tensor, sums: dict[int, Sums] = sums) -> None:
                if expert in sums:
                    sums[expert].add(x.clone(), None, None)

            with Listener(self._module, [stack], heard):
                for i, _ in enumerate(self._passes()):
                    if i % WINDOWS == WINDOWS - 1:
                        for one in sums.values():
                            one.close()
            for expert in list(sums):
                yield sums.pop(expert).statistics()


def passes(step: Callable[[int], object], samples: int) -> Passes:
    """Passes of which each step calls `step` with the number of the sample; its answer, unless it was cut short."""

    def begin() -> Iterator[object]:
        for i in range(samples):
            answer: object = None
            with contextlib.suppress(Stop):
                answer = step(i)
            yield answer

    return begin


def _by_token(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _noter(note: Callable[[str, torch.Tensor], None], name: str) -> Callable[..., None]:
    return lambda _module, inputs: note(name, inputs[0])
