"""Adam over small parameters that a model computes with in few bits: float32 masters, the model's own rounded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

_BETAS, _TINY = (0.9, 0.95), 1e-8


@dataclass(frozen=True)
class Group:
    """Parameters that learn alike.

    Args:
        parameters: by name.
        rate: length of a first step, for parameters whose root mean square is 1.
        relative: it is meant in proportion to their root mean square; else it is the length itself.
    """

    parameters: Mapping[str, nn.Parameter]
    rate: float
    relative: bool = True


class Masters:
    """The parameters in float32, their moments, and steps of Adam (Kingma and Ba 2015) on them.

    A step is as long as its rate times the root mean square that a parameter had at the beginning: weights of norms
    are a tenth in one family and fifty in another.
    """

    def __init__(self, groups: list[Group]) -> None:
        self._live = {name: p for group in groups for name, p in group.parameters.items()}
        self.values = {name: p.detach().float().clone() for name, p in self._live.items()}
        proportional = {name for group in groups if group.relative for name in group.parameters}
        self._size = {name: _size_of(w) if name in proportional else 1.0 for name, w in self.values.items()}
        self._rates = {name: group.rate for group in groups for name in group.parameters}
        self._first = {name: torch.zeros_like(w) for name, w in self.values.items()}
        self._second = {name: torch.zeros_like(w) for name, w in self.values.items()}
        self._steps = 0
        for p in self._live.values():
            p.requires_grad_(True)

    @torch.no_grad()
    def step(self, share: float) -> None:
        """One step with `share` of the rates along the gradients that the parameters have; these are forgotten."""
        self._steps += 1
        first, second = (1 - beta**self._steps for beta in _BETAS)
        for name, p in self._live.items():
            gradient = torch.zeros_like(self.values[name]) if p.grad is None else p.grad.float()
            p.grad = None
            m, v = self._first[name], self._second[name]
            m.lerp_(gradient, 1 - _BETAS[0])
            v.lerp_(gradient.square(), 1 - _BETAS[1])
            length = share * self._rates[name] * self._size[name] / first
            self.values[name].addcdiv_(m, (v / second).sqrt_().add_(_TINY), value=-length)
            p.copy_(self.values[name])

    def gradients(self) -> list[torch.Tensor]:
        """Those that the parameters have, zeros where they have none."""
        for p in self._live.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [p.grad for p in self._live.values() if p.grad is not None]

    @torch.no_grad()
    def set(self, values: Mapping[str, torch.Tensor]) -> None:
        """Give the parameters these values."""
        for name, p in self._live.items():
            self.values[name].copy_(values[name])
            p.copy_(self.values[name])

    def state(self) -> dict[str, torch.Tensor]:
        """All that the next step depends on."""
        parts = {"value": self.values, "first": self._first, "second": self._second}
        return {f"{part}/{name}": w for part, found in parts.items() for name, w in found.items()}

    def restore(self, state: Mapping[str, torch.Tensor], steps: int) -> None:
        """As `state` was after so many steps."""
        self._steps = steps
        for part, found in (("first", self._first), ("second", self._second)):
            for name, w in found.items():
                w.copy_(state[f"{part}/{name}"])
        self.set({name: state[f"value/{name}"] for name in self.values})


def _size_of(w: torch.Tensor) -> float:
    return float(w.square().mean().sqrt()) or 1.0


def share_of(step: int, steps: int, warm: int) -> float:
    """Of the rates, at a step from 0: rising over `warm` steps, then falling along half a cosine."""
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
