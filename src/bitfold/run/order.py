"""What another process has to know to make tensors of a run: enough for the same plan, and to see that it is that."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from bitfold.checkpoints import Source, open_source
from bitfold.checkpoints.targets import ENGINES, open_target
from bitfold.models.opening import open_skeleton
from bitfold.planning.plan import Plan, make_plan
from bitfold.recipes.recipe import Recipe
from bitfold.run.engine_export import held_by_engine
from bitfold.workspace.folder import other_result, require_same_software, software


@dataclass(frozen=True)
class Order:
    """Of one run.

    Args:
        source: where it is read.
        pre_tokenizer: of a GGUF file.
        rules: what is to be done, as TOML.
        shorten: whether rows shorter than a group get one scale a row.
        kind: of the output, as TARGETS have it.
        seed: of the run.
        identity: what decides the bytes, as JSON; see `decisive`.
    """

    source: str
    pre_tokenizer: str | None
    rules: str
    shorten: bool
    kind: str
    seed: int
    identity: str


@dataclass(frozen=True)
class Planned:
    """A source open for reading, its skeleton, and what becomes of every tensor."""

    source: Source
    model: nn.Module | None
    plan: Plan


def as_the_output_has_it(plan: Plan, kind: str, source: Source) -> tuple[Plan, tuple[str, ...]]:
    """The plan with what the output cannot hold as it was planned; and that in words."""
    target, said = open_target(kind, Path(), None, source), tuple[str, ...]()
    if kind in ENGINES:
        plan, said = held_by_engine(plan, target)
    return plan.kept_as(target.plain), said


def decisive(source: Source, plan: Plan, rules: Recipe, seed: int, kind: str) -> dict[str, Any]:
    """What decides the bytes of tensors that need no data."""
    return {
        "source": source.fingerprint(),
        "recipe": rules.to_dict(),
        "seed": seed,
        "kind": kind,
        "formats": {name: entry.to_dict() for name, entry in plan.entries(seed).items()},
        "version": software(),
    }


def as_text(identity: dict[str, Any]) -> str:
    """JSON by which two of them are compared."""
    return json.dumps(identity, sort_keys=True)


@lru_cache(maxsize=1)
def planned(order: Order) -> Planned:
    """The run as this process sees it; opened once.

    Raises:
        CheckpointError: this process would make other bytes; it says of what it has another one.
    """
    asked = json.loads(order.identity)
    require_same_software(asked["version"])
    source = open_source(Path(order.source), pre_tokenizer=order.pre_tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever gave the order has said it
        model = open_skeleton(source)
        rules = Recipe.loads(order.rules)
        plan = make_plan(source, model, rules, shorten_groups=order.shorten)
        plan, _ = as_the_output_has_it(plan, order.kind, source)
    _compare(asked, decisive(source, plan, rules, order.seed, order.kind))
    return Planned(source, model, plan)


def _compare(asked: dict[str, Any], found: dict[str, Any]) -> None:
    found = json.loads(as_text(found))
    if different := [key for key, value in asked.items() if found[key] != value]:
        raise other_result(different)
