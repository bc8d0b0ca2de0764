"""A quantized model that learns: which of its numbers do, one window forward and back, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bitfold.calibration.rehearsal import text_inputs
from bitfold.calibration.shape import walk_shape
from bitfold.calibration.tail import FEW, recomputed
from bitfold.errors import ModelError, ResourceError
from bitfold.evaluation.predictions import TopRows
from bitfold.system import memory
from bitfold.system.units import size_text
from bitfold.training.layers import frozen_layers, install
from bitfold.training.losses import divergence_and_gradient
from bitfold.training.masters import Group
from bitfold.training.reading import Loss, Reading, tokens_together

_SLACK = 200_000_000  # bytes: allocator, libraries that load when they first work
_STATE = 4 * 5 + 4  # bytes a trained number takes: its master, as it began, the best, two moments; a gradient
_TEMPORARIES = 6  # of a piece of logits in float32


@dataclass(frozen=True)
class Fit:
    """How a step is made to fit into memory.

    Args:
        keep: weights are decoded once.
        recompute: blocks run once more in the backward pass, instead of keeping what is inside them.
        nbytes: that it will take in all.
    """

    keep: bool
    recompute: bool
    nbytes: int


class Student:
    """A model and what of it is trained.

    Args:
        model: of `bitfold.load`, with its other weights in the dtype to compute in; its quantized layers are replaced.
        blocks: paths of its blocks, in order; empty = unknown.
        fit: of `fitting`.
        weights: matrices of linear layers in the blocks are trained, too, where they are in floating point.

    Raises:
        ModelError: nothing in it can be trained.
    """

    def __init__(self, model: nn.Module, blocks: list[str], fit: Fit, *, weights: bool = False) -> None:
        self.model: Any = model.requires_grad_(False)
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self._blocks = blocks if fit.recompute else []
        self.layers = install(model, dtype, keep=fit.keep)
        self.plain = {name: p for name, p in model.named_parameters() if p.dim() == 1 and p.is_floating_point()}
        self.matrices = matrices(model, blocks) if weights else {}
        if not self.layers and not self.plain and not self.matrices:
            raise ModelError("has no row scales, norms or biases to train", where=type(model).__name__)
        self._reading = Reading(model)

    def groups(self, rate: float, plain_rate: float, weight_rate: float) -> list[Group]:
        """What is trained: row factors, norms and biases, matrices, each at a rate of its own."""
        factors = {name: layer.factor for name, layer in self.layers.items() if layer.factor is not None}
        return [Group(factors, rate), Group(self.plain, plain_rate), Group(self.matrices, weight_rate)]

    def learn(self, ids: torch.Tensor, teacher: TopRows, share: float) -> float:
        """One window there and back; its mean KL(teacher || student), nats a token.

        Args:
            ids: int64 (tokens,).
            teacher: a row for each token but the last.
            share: gradients grow by so many times those of the mean divergence.
        """
        with torch.enable_grad(), recomputed(self.model, self._blocks) if self._blocks else nullcontext():
            states = self._reading.states(ids)
            total, gradient = self._reading.mean(states, ids, _from(teacher), share)
            states.backward(gradient)
        return total

    @torch.no_grad()
    def divergence(self, ids: torch.Tensor, teacher: TopRows) -> float:
        """Mean KL(teacher || student) of a window, nats a token; see `learn`."""
        return self._reading.mean(self._reading.states(ids), ids, _from(teacher), None)[0]


def _from(teacher: TopRows) -> Loss:
    return lambda logits, some: divergence_and_gradient(logits, teacher.part(some))


def matrices(model: nn.Module, blocks: list[str]) -> dict[str, nn.Parameter]:
    """Weights (n, k) of linear layers in the blocks that are in floating point, by name."""
    inside = tuple(f"{block}." for block in blocks)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and path.startswith(inside)}
    return {f"{path}.weight": layer.get_parameter("weight") for path, layer in layers.items()}


def blocks_of(skeleton: nn.Module | None) -> list[str]:
    """Paths of the blocks of a model, by its skeleton on the meta device."""
    return [] if skeleton is None else [block.path for block in walk_shape(skeleton).blocks]


def fitting(model: nn.Module, blocks: list[str], tokens: int, limit: int | None, *, weights: bool = False) -> Fit:
    """How steps on windows of so many tokens fit under a ceiling: as fast as can be.

    Args:
        model: of `bitfold.load`, not changed.
        blocks: paths of its blocks.
        tokens: of a window.
        limit: bytes of resident memory; None = no limit is known.
        weights: see `Student`.

    Raises:
        ResourceError: they do not, whatever is done.
    """
    size = max((p.element_size() for p in model.parameters() if p.is_floating_point()), default=4)
    decoded = [size * layer.in_features * layer.out_features for layer in frozen_layers(model).values()]
    inside = tokens * _saved_bytes(model)
    words = int(getattr(model, "get_input_embeddings")().weight.shape[0])  # noqa: B009
    here = (memory.resident() or 0) + 4 * _TEMPORARIES * words * tokens_together(words) + _SLACK
    here += _STATE * sum(w.numel() for w in matrices(model, blocks).values()) if weights else 0
    ways = [Fit(True, False, here + sum(decoded) + inside)]
    if blocks:
        edges = tokens * size * int(model.config.hidden_size) * len(blocks)  # type: ignore[union-attr,arg-type]
        ways.append(Fit(True, True, here + sum(decoded) + edges + 2 * inside // len(blocks)))
        ways.append(Fit(False, True, here + 4 * max(decoded, default=0) + edges + 2 * inside // len(blocks)))
    for way in ways:
        if limit is None or way.nbytes <= limit:
            return way
    hint = "shorter windows (--seqlen), or a higher ceiling"
    what = f"a step needs {size_text(ways[-1].nbytes)} of memory, {size_text(limit or 0)} are allowed"
    raise ResourceError(what, where="--max-memory", hint=hint)


def _saved_bytes(model: nn.Module) -> int:
    """Bytes a token that a forward pass keeps for the backward pass."""
    seen: dict[int, int] = {}
    weights = {p.data_ptr() for p in model.parameters()} | {b.data_ptr() for b in model.buffers()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []
    ids = torch.arange(1, 1 + FEW)[None]
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), _open(model):
        text: Any = model
        text.base_model(**text_inputs(model, ids))
    return sum(seen.values()) // FEW


@contextmanager
def _open(model: nn.Module) -> Iterator[None]:
    """With gradients that begin where token ids have become numbers."""

    def begin(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.detach().requires_grad_(True).clone()

    getter: Any = model
    handle = getter.get_input_embeddings().register_forward_hook(begin)
    try:
        yield
    finally:
        handle.remove()
