"""A mixture of bitfold's own: which ggml type each tensor gets, so that the whole file has a size and loses least.

What an error costs is known for each tensor from an importance matrix with gradients. What error a type makes is tried
on some of its rows. The sum of costs is least, exactly, within the size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from bitfold.checkpoints import Source
from bitfold.checkpoints.gguf.container import ALIGNMENT
from bitfold.checkpoints.gguf.described import describe_model
from bitfold.checkpoints.gguf.imatrix import Imatrix
from bitfold.checkpoints.gguf.mixtures import Typed, fitting, quantizable
from bitfold.checkpoints.repack import contents_of
from bitfold.checkpoints.targets import GGUF, open_target
from bitfold.errors import UsageError
from bitfold.formats import get_format
from bitfold.planning.allocation import allocate
from bitfold.planning.costs import Coder, error_costs, with_costs
from bitfold.system import progress
from bitfold.system.units import size_text

# For rows that blocks of 256 divide, and for others. Left out is what another of no more bits does better.
_LONG = ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0")
_SHORT = ("iq4_nl", "q4_1", "q5_0", "q5_1", "q8_0")


def own_mixture(
    source: Source,
    read: Callable[[str], torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    imatrix: Imatrix,
    budget: int,
) -> tuple[dict[str, Typed], float]:
    """The type of every tensor, and what errors will cost by this reckoning, in nats a token.

    Args:
        source: open.
        read: gives a tensor by the name that the model has for it, stacks of experts (e, n, k) whole.
        shapes: of these tensors.
        imatrix: of this model, with costs.
        budget: bytes of the whole file.

    Raises:
        CheckpointError: the importance matrix has no costs, or is of another model.
        UsageError: no file of the model is so small.
    """
    space = _space(source, shapes, budget)
    costs = []
    with progress.bar("try types", len(space.choices)) as bar:
        for name, sizes in space.choices.items():
            entry = with_costs(imatrix.entries.get(space.known[name]), shapes[name], name)
            coders = [_coder(type, entry.weights) for type in sizes]
            costs.append(error_costs(read(name).reshape(-1, shapes[name][-1]), entry, coders))
            bar.advance(1, name)
    picked = allocate(costs, [list(sizes.values()) for sizes in space.choices.values()], space.room)
    types = {name: Typed(list(sizes)[i]) for (name, sizes), i in zip(space.choices.items(), picked, strict=True)}
    types |= space.given
    return {name: types[name] for name in shapes}, sum(few[i] for few, i in zip(costs, picked, strict=True))


def require_room(source: Source, shapes: Mapping[str, tuple[int, ...]], budget: int) -> None:
    """UsageError where no file of the model is so small: known before what errors cost is measured."""
    _space(source, shapes, budget)


@dataclass(frozen=True)
class _Space:
    """What can be chosen.

    Args:
        given: types that are not.
        known: names in the file.
        choices: types of each other tensor, and what they take, bytes.
        room: that there is for those, bytes.
    """

    given: Mapping[str, Typed]
    known: Mapping[str, str]
    choices: Mapping[str, Mapping[str, int]]
    room: int


def _space(source: Source, shapes: Mapping[str, tuple[int, ...]], budget: int) -> _Space:
    model = describe_model(source.config, "", str(source.path))
    known = {name: model.gguf_name(name) or name for name in shapes}
    given = {name: Typed("f32") for name, shape in shapes.items() if not quantizable(known[name], shape)}
    choices = {}
    for name, shape in shapes.items():
        if name not in given:
            parts = max(1, len(model.arch.places(name)))
            choices[name] = {type: _nbytes(type, shape, parts) for type in _choices(shape[-1])}
    trial = given | {name: Typed(next(iter(sizes))) for name, sizes in choices.items()}
    whole = open_target(f"{GGUF}:auto", Path("unused"), None, source).size(contents_of(trial, shapes))
    beside = whole - sum(next(iter(sizes.values())) for sizes in choices.values())
    least = beside + sum(min(sizes.values()) for sizes in choices.values())
    if least > budget:
        what = f"at most {size_text(budget)} are wanted, and the smallest file of this model takes {size_text(least)}"
        raise UsageError(what, where="--target-size")
    return _Space(given, known, choices, budget - beside)


def _choices(columns: int) -> list[str]:
    types = next((types for types in (_LONG, _SHORT) if fitting(types[0], columns).type == types[0]), ("f16",))
    return list(types)


def _nbytes(type: str, shape: tuple[int, ...], parts: int) -> int:
    """Of a tensor that becomes so many alike in the file, as the gates and ups of experts do."""
    nbytes = 2 * prod(shape) if type == "f16" else get_format(type).layout(shape)["blocks"].nbytes
    return parts * -(-nbytes // parts // ALIGNMENT) * ALIGNMENT


def _coder(type: str, costs: torch.Tensor) -> Coder | None:
    """What a type makes of rows; None where nothing is lost."""
    if type == "f16":
        return None
    format = get_format(type)
    encode = format.weighted
    assert encode is not None
    return lambda rows: format.decode(encode(rows, costs), tuple(rows.shape))
