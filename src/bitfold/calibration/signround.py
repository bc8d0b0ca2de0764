"""SignRound (Cheng et al. 2023, arXiv 2309.05516; AutoRound): which way each weight is rounded, learned.

All layers of a block are tuned together against the output of the original block. Each weight gets an offset in
[-0.5, 0.5] steps that is added before rounding, each group a factor of its range; rounding passes gradients through,
and only their signs are used, with a step that falls to zero. What is kept is the best of the start, the middle and the
end, so the result is never worse than its start: rounding to nearest under the scheme's fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from bitfold.calibration.statistics import TuningBlock
from bitfold.errors import FormatError
from bitfold.formats import Format, Params
from bitfold.methods.rtn import fit_by_rows
from bitfold.models.swap import in_basis
from bitfold.planning.decisions import Quantized
from bitfold.qtensor import QTensor

_BATCH = 2  # windows a step
_RANGE = (0.5, 1.5)  # of the factors of ranges


@torch.no_grad()
def tune(
    whole: TuningBlock, decisions: dict[str, Quantized], *, seed: int
) -> Iterator[tuple[Quantized, QTensor, torch.Tensor]]:
    """Quantize layers of a block; the block gets the quantized weights.

    Args:
        whole: the block.
        decisions: by the name of the layer in the block.
        seed: of the choice of windows.

    Yields:
        Each decision with the quantized weight and the original one.

    Raises:
        FormatError: the levels of a format are not evenly spaced.
    """
    layers = {name: _Layer(whole.block.get_submodule(name), decision) for name, decision in decisions.items()}
    best, least = {name: layer.coded() for name, layer in layers.items()}, _loss(whole, layers)
    steps = max(d.scheme.solver.steps for d in decisions.values())
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        _step(whole, layers, generator, (1 - step / steps) / steps)
        if step + 1 in (steps // 2, steps) and (loss := _loss(whole, layers)) < least:
            best, least = {name: layer.coded() for name, layer in layers.items()}, loss
    for name, layer in layers.items():
        layer.restore(best[name].dequantize())
        yield decisions[name], best[name], layer.w


def _loss(whole: TuningBlock, layers: dict[str, _Layer]) -> float:
    """Mean square error of the block's output with the codes as they are now."""
    for layer in layers.values():
        layer.show(layer.coded().dequantize())
    total = count = 0.0
    for i in range(len(whole.inputs)):
        target = whole.targets[i]
        total += float((whole.run(i, whole.inputs[i]) - target).square().sum(dtype=torch.float64))
        count += target.numel()
    return total / count


def _step(whole: TuningBlock, layers: dict[str, _Layer], generator: torch.Generator, rate: float) -> None:
    """One move of all offsets and factors against the signs of their gradients."""
    windows = torch.randint(len(whole.inputs), (min(_BATCH, len(whole.inputs)),), generator=generator)
    with torch.enable_grad():
        for layer in layers.values():
            layer.show(layer.soft())
        for i in windows.tolist():
            wrong: Any = (whole.run(i, whole.inputs[i]) - whole.targets[i]).square().mean()
            wrong.backward(retain_graph=True)
    for layer in layers.values():
        layer.move(rate)


class _Layer:
    """One layer with what is learned of it.

    Args:
        module: a linear layer; its `weight` is replaced while it is tuned.
        decision: its format and fit.
    """

    def __init__(self, module: nn.Module, decision: Quantized) -> None:
        self._module: Any = module
        self._transposed = decision.site.transposed
        self.w = in_basis(module._parameters["weight"].detach(), decision.site, None).float()  # type: ignore[union-attr]
        self._format = even(decision.scheme.format, decision.tensor)
        self._start = fit_by_rows(self.w, self._format, decision.scheme.fit)
        self._offset = torch.zeros_like(self.w, requires_grad=True)
        self._factor = torch.ones_like(self._start.scale, requires_grad=True)
        self._blocks = self._format.blocks(tuple(self.w.shape))
        del module._parameters["weight"]

    def _params(self) -> Params:
        """As they will be stored; gradients as if they were not rounded."""
        scale = self._start.scale * self._factor
        wished = Params(scale.detach(), self._start.zero_point)
        stored = self._format.load_params(self._format.store_params(wished), tuple(self.w.shape))
        assert stored is not None
        return Params(scale + (stored.scale - scale).detach(), stored.zero_point)

    def soft(self) -> torch.Tensor:
        """The quantized weight as a function of what is learned."""
        params, low_high = self._params(), self._format.grid.span
        scale = params.scale[..., None]
        zero = 0.0 if params.zero_point is None else params.zero_point[..., None]
        split = self._blocks.split
        x = split(self.w) / torch.where(scale == 0, 1.0, scale) + zero + split(self._offset)
        rounded = (x + (x.round() - x).detach()).clamp(*low_high)
        return self._blocks.join((rounded - zero) * scale)

    def coded(self) -> QTensor:
        """The quantized weight."""
        params = self._params()
        steps = params.scale.detach()[..., None].expand_as(self._blocks.split(self.w))
        aim = self.w + self._offset.detach() * self._blocks.join(steps)
        wished = Params(self._start.scale * self._factor.detach(), self._start.zero_point)
        return QTensor(self._format, tuple(self.w.shape), self._format.encode(aim, wished))

    def show(self, w: torch.Tensor) -> None:
        """Let the block run with this weight."""
        self._module.weight = w.T if self._transposed else w

    def move(self, rate: float) -> None:
        """Against the signs of the gradients."""
        for learned, low, high in ((self._offset, -0.5, 0.5), (self._factor, *_RANGE)):
            if learned.grad is not None:
                learned.data.sub_(rate * learned.grad.sign()).clamp_(low, high)
                learned.grad = None

    def restore(self, w: torch.Tensor) -> None:
        """Give the module a parameter again."""
        del self._module.weight
        self._module.weight = nn.Parameter(w.T if self._transposed else w, requires_grad=False)


def even(format: Any, where: str) -> Format:
    """The format, if its levels are evenly spaced: half a step must mean the same everywhere."""
    low, high = format.span
    if format.scale is None or format.grid is None or format.grid.levels != high - low + 1:
        raise FormatError(
            f"signround needs evenly spaced levels, which {format.name} has not", where=where, hint="int4-asym-g64"
        )
    found: Format = format
    return found


__all__ = ["even", "tune"]
