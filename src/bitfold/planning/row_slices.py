"""Large tensors a few rows at a time: memory for the piece at hand, not for the tensor.

A tensor is taken in pieces where the source can read rows, the model has it as the source does, and the format lets
rows be taken apart (no scale and no tile belongs to two pieces). Pieces depend on the shape alone, so the bytes do too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

import torch

from bitfold.checkpoints import Source
from bitfold.methods.anomalies import Zeros
from bitfold.models.sites import EXPERTS
from bitfold.models.swap import in_basis, quantize_site_tensor, transform_of
from bitfold.planning.decisions import Decision, Quantized
from bitfold.planning.plan import Item
from bitfold.qtensor import QTensor, rows_stack
from bitfold.records.run_report import relative_parts
from bitfold.system.backend import CPU

WEIGHTS = 1 << 24  # of a piece, about
_ALIGNED = 256  # rows: a multiple of all tiles


def ranges(shape: tuple[int, ...], unit: int = 1) -> list[tuple[int, int]]:
    """First and last-but-one row (expert) of each piece of a tensor, `unit` rows staying together."""
    step = max(1, WEIGHTS // max(1, prod(shape[1:])))
    if len(shape) < 3 and step > _ALIGNED and unit == 1:
        step = step // _ALIGNED * _ALIGNED
    step = max(unit, step // unit * unit)
    return [(at, min(at + step, shape[0])) for at in range(0, shape[0], step)] if shape else [(0, 1)]


def in_pieces(source: Source, item: Item, decision: Decision) -> bool:
    """Whether a tensor is taken in pieces."""
    found = _ranges(decision)
    whole = source.read_rows is None or item.target.converter is not None or len(found) < 2
    if whole or not isinstance(decision, Quantized):
        return not whole
    if decision.scheme.needs_text:
        return False
    if decision.site.kind == EXPERTS:
        return True
    parts = [(b - a, decision.info.shape[1]) for a, b in found]
    return not decision.site.transposed and rows_stack(decision.scheme.format, parts)


def _ranges(decision: Decision) -> list[tuple[int, int]]:
    """Of its rows; the rows of an expert stay together."""
    experts = decision.site.experts if isinstance(decision, Quantized) else None
    shape = decision.info.shape
    return ranges(shape, 1 if experts is None else shape[0] // experts)


def read_pieces(source: Source, item: Item, decision: Decision) -> Iterator[torch.Tensor]:
    """The tensor, piece by piece."""
    assert source.read_rows is not None
    for first, stop in _ranges(decision):
        yield source.read_rows(item.target.sources[0], torch.arange(first, stop))


def quantize_pieces(
    source: Source, item: Item, decision: Quantized, seed: int, device: torch.device = CPU
) -> tuple[QTensor, float, list[str]]:
    """The quantized tensor, its relative square error, and what is odd about its zeros; quantized on that device."""
    scheme, site = decision.scheme, decision.site
    found, loss, norm, zeros = [], 0.0, 0.0, Zeros()
    for w in read_pieces(source, item, decision):
        experts = None if site.experts is None else len(w) * site.experts // site.shape[0]
        part = replace(site, shape=tuple(w.shape), experts=experts)
        q = quantize_site_tensor(w, part, scheme, seed, device)
        original = in_basis(w, part, transform_of(scheme, part, seed))
        for matrix, decoded in zip(*_matrices(original, q), strict=True):
            more = relative_parts(matrix, decoded)
            loss, norm = loss + more[0], norm + more[1]
            zeros.add(matrix)
            if original.dim() == 3:
                zeros.close()
        found.append(q)
    fields = {name: torch.cat([q.fields[name] for q in found]) for name in found[0].fields}
    whole = QTensor(found[0].format, site.qshape, fields)
    assert not whole.format.plain or "values" in fields
    return whole, loss / norm if norm > 0 else 0.0, zeros.flags(table=site.is_table)


def _matrices(w: torch.Tensor, q: QTensor) -> tuple[list[torch.Tensor], list[QTensor]]:
    if w.dim() == 2:
        return [w], [q]
    return list(w), [q.expert(i) for i in range(len(w))]
