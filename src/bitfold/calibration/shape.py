"""How a model is walked: which lists of blocks, one after the other, which layers of a block share their input.

Found once, by a rehearsal, and used by whoever has to know: the walk itself, the estimates of memory and time, and the
choice of a method where nobody names one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from bitfold.calibration.fallback import sentence
from bitfold.calibration.rehearsal import Chain, Rehearsal, Seen, elements, takes_text
from bitfold.errors import UsageError
from bitfold.models.limits import positions
from bitfold.models.sites import LINEAR, find_sites

LONGEST = 2048  # tokens of a window, where nobody says otherwise
Place = int | str  # of the activations among the arguments of a block: a position, or a name
Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class BlockShape:
    """One block.

    Args:
        path: of its module.
        place: where it takes the activations.
        answer: what it returned in the rehearsal, of which `at` is the place of the activations; None = it returns
            nothing else.
        groups: its linear layers by the input that they share, in the order of their execution.
    """

    path: str
    place: Place
    answer: tuple[Any, ...] | None
    at: int | None
    groups: Groups

    def answering(self, hidden: torch.Tensor) -> Any:
        """What the block returns, with these activations."""
        if self.at is None or self.answer is None:
            return hidden
        return (*self.answer[: self.at], hidden, *self.answer[self.at + 1 :])

    def handed_on(self, answer: Any) -> torch.Tensor:
        """The activations in what the block returned."""
        found: torch.Tensor = answer if self.at is None else answer[self.at]
        return found


@dataclass(frozen=True)
class ChainShape:
    """A list of blocks, each of which takes the output of the one before and nothing else that others have made."""

    path: str
    blocks: tuple[BlockShape, ...]


@dataclass(frozen=True)
class WalkShape:
    """Of a model.

    Args:
        chains: lists that can be walked block by block, in the order of their execution.
        others: groups of layers outside them, by the block or module that they are in; their inputs can be had only
            while the whole model runs.
        obstacle: why the model cannot be run at all, in words; None if it can.
        unwalkable: why a list of blocks is not among `chains`, by its path.
    """

    chains: tuple[ChainShape, ...] = ()
    others: tuple[tuple[str, Groups], ...] = ()
    obstacle: str | None = None
    unwalkable: tuple[tuple[str, str], ...] = ()

    @property
    def blocks(self) -> list[BlockShape]:
        """Of all chains."""
        return [block for chain in self.chains for block in chain.blocks]

    @property
    def layers(self) -> list[str]:
        """Paths of the layers in them."""
        return [layer for block in self.blocks for group in block.groups for layer in group]


_KNOWN: WeakKeyDictionary[nn.Module, WalkShape] = WeakKeyDictionary()


def walk_shape(model: nn.Module | None) -> WalkShape:
    """The shape of a model on the meta device; each is rehearsed once."""
    if model is None:
        return WalkShape(obstacle="transformers does not have the model's class")
    if model not in _KNOWN:
        _KNOWN[model] = _rehearsed(model)
    return _KNOWN[model]


def _rehearsed(model: nn.Module) -> WalkShape:
    name = type(model).__name__
    if not takes_text(model):
        return WalkShape(obstacle=f"{name} does not run on text")
    layers = [site.module for site in find_sites(model) if site.kind == LINEAR]
    run = Rehearsal(model, layers)
    if run.failure is not None:
        return WalkShape(obstacle=f"{name} does not run on text: {sentence(run.failure)}")
    chains, others, unwalkable = list[ChainShape](), list[tuple[str, Groups]](), list[tuple[str, str]]()
    for chain in run.chains:
        wrong = chain.obstacle or _no_chain(chain)
        if wrong is None:
            chains.append(ChainShape(chain.path, tuple(_block(chain, number) for number in range(len(chain.seen)))))
        else:
            unwalkable.append((chain.path, wrong))
            others += [(seen.path, _frozen(seen.groups)) for seen in chain.seen]
    others += [(group[0].rpartition(".")[0], _frozen([group])) for group in run.outside]
    return WalkShape(tuple(chains), tuple(others), None, tuple(unwalkable))


def _frozen(groups: Iterable[Sequence[str]]) -> Groups:
    return tuple(tuple(group) for group in groups)


def _no_chain(chain: Chain) -> str | None:
    """What keeps a list whose modules were called once each from being walked."""
    first, *later = chain.seen
    if not later and _only_place(first) is None:
        return "it is a single block whose activations cannot be told from its other arguments"
    if not any(seen.groups for seen in chain.seen):
        return "there are no layers in it"
    return None


def _only_place(seen: Seen) -> tuple[Place, int | None] | None:
    """Of a block that is alone: the tensor that goes in as it comes out."""
    for at, made in elements(seen.answer):
        for place, value in seen.arguments.items():
            if isinstance(made, torch.Tensor) and isinstance(value, torch.Tensor) and value.shape == made.shape:
                return place, at
    return None


def _block(chain: Chain, number: int) -> BlockShape:
    seen = chain.seen[number]
    alone = _only_place(seen) if len(chain.seen) == 1 else None
    place = alone[0] if alone else seen.hidden if seen.hidden is not None else chain.seen[1].hidden
    assert place is not None, "a chain hands on"
    at = alone[1] if alone else seen.at
    if number == len(chain.seen) - 1 and not alone and not isinstance(seen.answer, torch.Tensor):
        at = chain.seen[number - 1].at or 0  # nobody took it over
    answer = None if at is None else tuple(seen.answer)
    return BlockShape(seen.path, place, answer, at, _frozen(seen.groups))


def window(asked: int | None, model: Any) -> int:
    """Tokens of a window of calibration text.

    Args:
        asked: what the user wants; None = LONGEST, or what the model has positions for.
        model: of transformers.

    Raises:
        UsageError: more than the model has positions for.
    """
    limit = positions(model.config)
    if asked is not None and limit is not None and asked > limit:
        raise UsageError(f"the model has positions for {limit} tokens, not {asked}", where="--seqlen")
    return asked or min(LONGEST, limit or LONGEST)
