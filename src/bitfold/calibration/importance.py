"""How much the inputs of each weight matter: their mean squares, and what an error costs, in nats a token.

To second order an error D of a weight costs half the mean square of its product with the gradient of the loss of a
text, labels drawn from the model (so that this is the Fisher information). Errors of rounding have no pattern, so what
remains is the sum of D^2, each times half the mean square of its own gradient. That is the gradient of the whole text:
what an error does to one token, others see, and inputs that are alike in all tokens (values, attention) add up. Kept
are its sums over rows and columns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from bitfold.calibration.fisher import there_and_back
from bitfold.calibration.shape import WalkShape
from bitfold.calibration.statistics import Wanted
from bitfold.calibration.tail import FEW, Tail, recomputed
from bitfold.calibration.tensors import Reader
from bitfold.calibration.walk import BlockWalk, Text
from bitfold.checkpoints.gguf.imatrix import Importance
from bitfold.models.sites import EXPERTS, LINEAR, Site, find_sites
from bitfold.system import progress

_AT_ONCE = 1 << 22  # numbers of a gradient that are squared at a time


def by_blocks(model: nn.Module, reader: Reader, shape: WalkShape, ids: torch.Tensor) -> dict[str, Importance]:
    """Mean squares alone, by name of the weight; one block of the model in memory.

    Args:
        model: the skeleton.
        reader: of its tensors.
        shape: how it is walked.
        ids: token ids (samples, seqlen).
    """
    sites, found = {site.tensor: site for site in find_sites(model)}, dict[str, Importance]()
    for chain in shape.chains:
        walk = BlockWalk(model, reader, chain, Text(ids))
        walk.start()
        walk.forget_original()
        with progress.bar("measure inputs", len(walk)) as bar:
            for index in range(len(walk)):
                inside = [s for s in sites.values() if s.tensor.startswith(walk.inside(index))]
                layers = [s.module for s in inside if s.kind == LINEAR]
                stacks = {s.tensor: s.qshape for s in inside if s.kind == EXPERTS}
                for group, statistics in walk.block(index, layers, stacks, None, lambda _layer: Wanted(cross=False)):
                    squares = torch.stack([one.hessian.diagonal().clone() for one in statistics])
                    for name in group:
                        stacked = name in stacks
                        found[name if stacked else f"{name}.weight"] = Importance(squares if stacked else squares[0])
                bar.advance(1)
    return found


class Windows(Protocol):
    """Where the sums over the windows that are finished are kept, for a process that goes on."""

    def load(self) -> dict[str, torch.Tensor] | None:
        """What was kept last; None: nothing was."""

    def keep(self, state: dict[str, torch.Tensor]) -> None:
        """Keep it in place of what was kept before."""


def by_gradients(
    model: Any, shape: WalkShape, ids: torch.Tensor, seed: int, windows: Windows | None = None
) -> dict[str, Importance]:
    """Mean squares, and what errors cost, by name of the weight; stacks of experts (e, n, k) count as (e * n, k).

    Args:
        model: the original model, whole, float32.
        shape: how it is walked.
        ids: token ids (samples, seqlen).
        seed: of the labels.
        windows: where finished windows are kept.

    Raises:
        ModelError: a vocabulary whose logits take too much memory.
        Exception: whatever the model raises when it is differentiated.
    """
    sums, generator = _Sums(), torch.Generator().manual_seed(seed)
    wanted = {site.tensor: site for site in find_sites(model)}
    known = None if windows is None else windows.load()
    done = 0 if known is None else sums.take(known, generator)
    tail = Tail.of(model, ids[:1, :FEW])
    with (
        sums.listening(model, wanted),
        recomputed(model, [block.path for block in shape.blocks]),
        progress.bar("measure what errors cost", len(ids)) as bar,
        torch.enable_grad(),
    ):
        bar.skip(done)
        for number, sample in enumerate(ids[done:], done + 1):
            there_and_back(model, tail, sample[None], generator)
            if windows is not None:
                windows.keep(sums.state(number, generator))
            bar.advance(1)
    return {name: sums.importance(name, ids.numel()) for name in wanted if name in sums.rows}


class _Sums:
    """Sums over windows: of squares of inputs, of squares of gradients by row and by column."""

    _LISTS = ("rows", "_columns", "_squares", "_seen")

    def __init__(self) -> None:
        self.rows: dict[str, torch.Tensor] = {}
        self._columns: dict[str, torch.Tensor] = {}
        self._squares: dict[str, torch.Tensor] = {}
        self._seen: dict[str, torch.Tensor] = {}

    def state(self, windows: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """All sums after so many windows, and where the generator of the labels is."""
        found = {f"{part}/{name}": x for part in self._LISTS for name, x in getattr(self, part).items()}
        return {**found, "windows": torch.tensor(windows), "generator": generator.get_state()}

    def take(self, state: dict[str, torch.Tensor], generator: torch.Generator) -> int:
        """Go on from there; says how many windows are done."""
        for key, values in state.items():
            part, slash, name = key.partition("/")
            if slash:
                getattr(self, part)[name] = values
        generator.set_state(state["generator"])
        return int(state["windows"])

    @contextlib.contextmanager
    def listening(self, model: nn.Module, wanted: Mapping[str, Site]) -> Iterator[None]:
        """Gradients of these weights are looked at and let go as soon as they are there."""
        parameters = dict(model.named_parameters())
        handles: list[Any] = []
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        for name, site in wanted.items():
            if name not in parameters:  # tied to one that is
                continue
            parameters[name].requires_grad_(True)
            listen: Any = parameters[name].register_post_accumulate_grad_hook
            handles.append(listen(partial(self._gradient, site)))
            if site.kind == LINEAR:
                module = model.get_submodule(site.module)
                handles.append(module.register_forward_pre_hook(partial(self._input, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _gradient(self, site: Site, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        gradient, name = site.oriented(parameter.grad), site.tensor
        parameter.grad = None
        gradient = gradient.reshape(-1, gradient.shape[-1])
        rows, columns = torch.zeros(len(gradient)), torch.zeros(gradient.shape[1])
        for at in range(0, len(gradient), step := max(1, _AT_ONCE // gradient.shape[1])):
            squares = gradient[at : at + step].float().square()
            rows[at : at + step] = squares.sum(1)
            columns += squares.sum(0)
        self.rows[name] = self.rows.get(name, 0) + rows
        self._columns[name] = self._columns.get(name, 0) + columns

    def _input(self, name: str, _module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].detach().float().reshape(-1, inputs[0].shape[-1])
        self._squares[name] = self._squares.get(name, 0) + x.square().sum(0)
        self._seen[name] = self._seen.get(name, torch.tensor(0)) + len(x)

    def importance(self, name: str, tokens: int) -> Importance:
        """Of a weight whose gradient came: rows with mean 1."""
        rows, columns = self.rows[name], self._columns[name]
        costs = 0.5 * columns / len(rows) / tokens
        squares = self._squares[name] / self._seen[name] if name in self._squares else torch.ones(len(columns))
        return Importance(squares, costs, rows / rows.mean().clamp_min(1e-30))
