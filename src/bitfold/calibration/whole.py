"""Layers whose inputs can be had only while the whole model runs: no list of blocks in which one follows the other.

The original model is in memory, float32, and runs over the text as it is; each layer is solved under the inputs that it
has there. What the layers before have lost is not made up for, which is why blocks are walked wherever they can be.
Nothing depends on what is quantized already, so a run can stop and go on between any two blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from bitfold.calibration.embedded import Tensors
from bitfold.calibration.rehearsal import text_inputs
from bitfold.calibration.runner import HESSIANS, SUMMED, Runner, passes
from bitfold.calibration.spill import Stream
from bitfold.calibration.statistics import Statistics, Sums, Wanted
from bitfold.calibration.walk import Text, Tuner
from bitfold.errors import ModelError
from bitfold.nn import set_tensor

WHOLE = "the whole model"


class WholeWalk:
    """The layers of a model by the block or module that they are in, in the order in which these run.

    Args:
        model: the skeleton on the meta device; it gets the weights of the layers at hand.
        source: the tensors of the model by name.
        whole: the original model, in memory.
        text: what runs through it.
        hessian_bytes: bytes of Hessians in memory at a time.
    """

    def __init__(
        self, model: nn.Module, source: Tensors, whole: nn.Module, text: Text, hessian_bytes: int = HESSIANS
    ) -> None:
        self.model, self._source, self._text, self._hessian_bytes = model, source, text, hessian_bytes
        run = partial(_run, whole, text.ids)
        self._whole, self._runner = whole, Runner(whole, passes(run, len(text.ids)), hessian_bytes)
        self._blocks: list[tuple[str, list[list[str]]]] = []
        self._known: dict[str, Statistics] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def inside(self, index: int) -> str:
        """What the names of the tensors of a block begin with."""
        return f"{self._blocks[index][0]}."

    @property
    def name(self) -> str:
        """By which it is known among the walks of a run."""
        return WHOLE

    @property
    def streams(self) -> Mapping[str, Stream]:
        """Nothing has to wait on disk."""
        return {}

    def enter(self, streams: Mapping[str, Stream]) -> None:
        """Nothing has to be taken up."""

    @torch.no_grad()
    def start(self, layers: Sequence[str], stacks: Sequence[str]) -> None:
        """Find out which of the layers and stacks of experts run, and which share their input."""
        groups: dict[str, list[list[str]]] = {}
        for group in self._runner.groups(layers, stacks):
            for block in dict.fromkeys(block_of(name) for name in group):  # all cross attentions hear the same encoder
                groups.setdefault(block, []).append([name for name in group if block_of(name) == block])
        self._blocks = list(groups.items())

    @torch.no_grad()
    def block(
        self,
        index: int,
        layers: list[str],
        stacks: Mapping[str, Sequence[int]] | None = None,
        tuner: Tuner | None = None,
        wanted: Callable[[str], Wanted] = lambda _layer: Wanted(),
    ) -> Iterator[tuple[list[str], Iterable[Statistics]]]:
        """Yield the groups of layers of a block with their statistics; see `BlockWalk.block`.

        Raises:
            ModelError: layers are to be tuned against the output of their block, which has none of its own here.
        """
        if tuner is not None:
            raise ModelError("its blocks cannot be run one by one, as tuning them needs", where=self.inside(index))
        _, groups = self._blocks[index]
        stacks = stacks or {}
        if any(group[0] not in self._known for group in groups if group[0] not in stacks):
            self._measure(index, set(stacks), wanted)
        prefix = self.inside(index)
        self._fill(prefix, layers, list(stacks))
        for group in groups:
            if group[0] in stacks:
                yield group, self._runner.measure_experts(group[0], stacks[group[0]])
            else:
                yield group, [self._known.pop(group[0])]
        for name, value in list(self.model.named_parameters(remove_duplicate=False)):
            if name.startswith(prefix) and not value.is_meta:
                set_tensor(self.model, name, value.to("meta"))

    def _measure(self, index: int, stacks: set[str], wanted: Callable[[str], Wanted]) -> None:
        """One pass for this block, and as many of those after it as there is room for."""
        sums: dict[str, Sums] = {}
        weights: dict[str, torch.Tensor] = {}
        room = self._hessian_bytes
        for _, groups in self._blocks[index:]:
            heads = [group for group in groups if self._is_layer(group[0]) and group[0] not in stacks]
            room -= sum(SUMMED * self._shape(group[0])[-1] ** 2 for group in heads)
            if sums and room < 0:
                break
            for group in heads:
                about = wanted(group[0])
                sums[group[0]] = Sums(self._shape(group[0]), Wanted(False, about.columns, about.basis))
                if (weight := self._text.weight(group)) is not None:
                    weights[group[0]] = weight
        self._runner.measure_together(sums, weights)
        self._known = {layer: found.statistics() for layer, found in sums.items()}

    def _is_layer(self, name: str) -> bool:
        owner, _, last = name.rpartition(".")
        return isinstance(getattr(self._whole.get_submodule(owner), last), nn.Module)

    def _shape(self, layer: str) -> torch.Size:
        return self._whole.get_parameter(f"{layer}.weight").shape

    def _fill(self, prefix: str, layers: Sequence[str], stacks: Sequence[str]) -> None:
        """The weights of the layers at hand, as they are stored: running may have rescaled those of the whole model.

        The vectors of the block as well: a norm may take factors of the layers behind it.
        """
        heads = {f"{layer}.weight" for layer in layers} | set(stacks)
        for name, value in list(self.model.named_parameters(remove_duplicate=False)):
            if name.startswith(prefix) and (name in heads or value.dim() < 2) and name in self._source:
                set_tensor(self.model, name, self._source.read(name).float())


def block_of(name: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.up_proj`; the module that a layer is in where nothing is numbered."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else name.rpartition(".")[0] or name


def _run(whole: Any, ids: torch.Tensor, sample: int) -> None:
    with torch.no_grad():
        whole(**text_inputs(whole, ids[sample : sample + 1]))
