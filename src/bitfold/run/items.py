"""Tensors that need no data: what is to be written of them, item by item of a plan."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bitfold.checkpoints import Source
from bitfold.methods.anomalies import error_flags, kept_flags, weight_flags
from bitfold.models.swap import in_basis, quantize_site_tensor, transform_of
from bitfold.planning.decisions import Decision, Packed, Quantized, Tied
from bitfold.planning.plan import Item
from bitfold.planning.row_slices import in_pieces, quantize_pieces, read_pieces
from bitfold.qtensor import QTensor
from bitfold.records.run_report import relative_error
from bitfold.system.backend import CPU
from bitfold.transforms.activations import ACT_SCALE


@dataclass(frozen=True)
class Made:
    """A tensor ready to be written.

    Args:
        decision: which.
        value: the fields of a packed one; of a plain one the consecutive pieces of its rows.
        error: relative square error of the weights; None for kept ones.
        flags: what looks wrong, in words; of a plain one complete when its pieces were taken.
    """

    decision: Decision
    value: Mapping[str, torch.Tensor] | Iterable[torch.Tensor]
    error: float | None = None
    flags: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """What `report` wants to know, once `value` was taken."""
        return {"error": self.error, "flags": tuple(self.flags)}


def make_item(
    source: Source, model: nn.Module | None, item: Item, seed: int, done: Container[str], device: torch.device = CPU
) -> Iterator[Made]:
    """The tensors of an item, one after the other.

    Args:
        source, model: of the run.
        item: what is made together.
        seed: of the run.
        done: names of those that are written already.
        device: where they are quantized.
    """
    only = next(iter(item.decisions.values()))
    if isinstance(only, Packed):
        yield Made(only, source.fields(item.target.sources[0]))
        return
    if in_pieces(source, item, only):
        yield _in_pieces(source, item, only, seed, device)
        return
    tensors = item.target.read(source.read, model)
    for name in list(tensors):
        w, decision = tensors.pop(name), item.decisions[name]
        if isinstance(decision, Tied) or name in done:
            continue
        if isinstance(decision, Quantized):
            yield _quantized(decision, w, seed, device)
        else:
            w = w.to(decision.info.dtype)
            yield Made(decision, [w], flags=list(kept_flags(w)))


def left_of(item: Item, done: Container[str]) -> list[str]:
    """Names of its tensors that are to be written, but for those that are done."""
    return [name for name, d in item.decisions.items() if not isinstance(d, Tied) and name not in done]


def _in_pieces(source: Source, item: Item, decision: Decision, seed: int, device: torch.device) -> Made:
    """A tensor that is too large to be in memory at once without need."""
    if isinstance(decision, Quantized):
        q, error, odd = quantize_pieces(source, item, decision, seed, device)
        return _packed(decision, q, error, odd, seed)
    found: list[str] = []

    def rows() -> Iterator[torch.Tensor]:
        for w in read_pieces(source, item, decision):
            found.extend([] if found else kept_flags(w))
            yield w.to(decision.info.dtype)

    return Made(decision, rows(), flags=found)


def _quantized(decision: Quantized, w: torch.Tensor, seed: int, device: torch.device) -> Made:
    scheme, site = decision.scheme, decision.site
    q = quantize_site_tensor(w, site, scheme, seed, device)
    original = in_basis(w, site, transform_of(scheme, site, seed))
    odd = weight_flags(original, table=site.is_table)
    return _packed(decision, q, relative_error(original, q), odd, seed)


def _packed(decision: Quantized, q: QTensor, error: float, odd: list[str], seed: int) -> Made:
    entry = decision.entry(seed)
    sides = {} if entry is None or entry.transform is None else entry.transform.fields()
    if decision.scheme.activations.static:
        sides = {**sides, ACT_SCALE: torch.zeros(1)}  # no data: each token by itself
    return Made(decision, stored_value(decision, q, sides), error, [*odd, *flags_of_error(decision, error)])


def stored_value(
    decision: Quantized, q: QTensor, sides: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor] | Iterable[torch.Tensor]:
    """What is stored: fields and what stands beside them, the model's tensor for plain formats."""
    return [decision.site.restored(q.fields["values"])] if q.format.plain else {**q.fields, **sides}


def flags_of_error(decision: Quantized, error: float) -> list[str]:
    """What is odd about the relative square error of a weight."""
    scheme = decision.scheme
    if scheme.sparsity is not None:
        return []
    return error_flags(error, scheme.format, scheme.fit.name, feedback=scheme.solver.needs_hessian)
