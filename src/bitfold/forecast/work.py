"""What a calibrated run will go through, block by block: the plan, as the walk will come to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from bitfold.calibration.head import head_of
from bitfold.calibration.shape import Groups, walk_shape
from bitfold.models.sites import EMBEDDING, EXPERTS
from bitfold.planning.decisions import Decision, Quantized
from bitfold.planning.plan import Plan


@dataclass(frozen=True)
class GroupShape:
    """Layers that are solved together: inputs k, rows n, in all, and how they are solved.

    Args:
        name: of the module that they are in.
        k, n: of the weights, one upon the other.
        layers: how many they are.
        largest: rows of the largest one.
        in_basis: whether a transform makes copies of them.
        first: one of them.
    """

    name: str
    k: int
    n: int
    layers: int
    largest: int
    in_basis: bool
    first: Quantized


@dataclass(frozen=True)
class BlockWork:
    """One block.

    Args:
        name: of the block.
        decisions: about all its tensors.
        wanted: those that are calibrated.
        groups: its layers by the input that they share.
        whole: whether its inputs are heard while the whole model runs.
    """

    name: str
    decisions: Sequence[Decision]
    wanted: Sequence[Quantized]
    groups: Sequence[GroupShape]
    whole: bool


def work_of(plan: Plan, model: nn.Module) -> list[BlockWork]:
    """The blocks in which anything is calibrated, in the order in which they are come to."""
    shape = walk_shape(model)
    places: list[tuple[str, Groups, bool]] = [(block.path, block.groups, False) for block in shape.blocks]
    places += [(path, groups, True) for path, groups in shape.others]
    found = dict[tuple[str, bool], list[tuple[str, ...]]]()
    for path, groups, whole in places:
        found.setdefault((path, whole), []).extend(groups)
    inside: dict[str, list[Decision]] = defaultdict(list)
    paths = {path for path, _ in found}
    head = head_of(model, plan.quantized) if shape.chains else None  # solved by itself, behind the blocks
    for decision in plan.written:
        if decision is not head and (owner := _owner(decision.tensor, paths)) is not None:
            inside[owner].append(decision)
    work = (_block(path, inside[path], groups, whole) for (path, whole), groups in found.items())
    return [block for block in work if block.wanted]


def _owner(tensor: str, paths: set[str]) -> str | None:
    """The outermost of the blocks that a tensor is in."""
    parts = tensor.split(".")
    prefixes = (".".join(parts[:count]) for count in range(1, len(parts)))
    return next((prefix for prefix in prefixes if prefix in paths), None)


def _block(path: str, decisions: list[Decision], groups: Sequence[Sequence[str]], whole: bool) -> BlockWork:
    wanted = [d for d in decisions if isinstance(d, Quantized) and d.scheme.needs_text]
    layers = {d.site.module: d for d in wanted if d.site.kind not in (EMBEDDING, EXPERTS)}
    members = [[layers.pop(name) for name in group if name in layers] for group in groups]
    members += _alike(layers.values())  # the rehearsal sent no token to them
    return BlockWork(path, decisions, wanted, [_group(found) for found in members if found], whole)


def _alike(layers: Iterable[Quantized]) -> list[list[Quantized]]:
    """Layers that most likely share their input: one parent module, one width."""
    members: dict[tuple[str, int], list[Quantized]] = defaultdict(list)
    for d in layers:
        members[d.site.module.rpartition(".")[0], d.site.qshape[1]].append(d)
    return list(members.values())


def _group(members: list[Quantized]) -> GroupShape:
    rows, first = [d.site.qshape[0] for d in members], members[0]
    in_basis = any(d.scheme.transform.changes_basis for d in members)
    name = first.site.module.rpartition(".")[0]
    return GroupShape(name, first.site.qshape[1], sum(rows), len(rows), max(rows), in_basis, first)
