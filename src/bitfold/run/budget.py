"""A folder of a size: which format each weight gets, measured, reckoned, checked on text, and written as a recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitfold.calibration.noise import noisy_divergences
from bitfold.calibration.shape import walk_shape
from bitfold.calibration.tensors import original
from bitfold.checkpoints import Source
from bitfold.checkpoints.gguf.imatrix import Imatrix, Importance, read_imatrix
from bitfold.checkpoints.targets import open_target
from bitfold.errors import BitfoldError, ModelError, UsageError
from bitfold.models.sites import Site
from bitfold.planning.choices import CANDIDATES, Choice, Weight, everywhere, grouped, least_cost, uniform, weigh
from bitfold.planning.costs import with_costs
from bitfold.planning.decisions import Quantized
from bitfold.planning.plan import Plan, make_plan
from bitfold.planning.tables import with_tables
from bitfold.recipes.recipe import Recipe
from bitfold.run.importance import few, measured, named_as, require_memory, tokens_of, whole_reader
from bitfold.run.kept_plan import KeptPlan
from bitfold.run.options import Request, RunOptions
from bitfold.system import progress
from bitfold.system.units import size_text

_METHODS = (None, "auto", "trellis", "rtn")
_HELD_OUT = 4  # windows of the text that plans are compared on, after those that were measured


def check_budget(request: Request, options: RunOptions) -> None:
    """Raise what can be known before anything is opened.

    Raises:
        UsageError: options that say what the budget is to find out.
    """
    flag, wanted = request.budget_flag, request.wanted
    said = [name for name in wanted.given() if name not in ("--method", "--act")]
    if said:
        raise UsageError(f"a budget chooses what {', '.join(said)} would say", where=flag, hint="drop one of them")
    if wanted.method not in _METHODS:
        what = f"formats are chosen among those of trellis, not of {wanted.method}"
        raise UsageError(what, where="--method", hint="trellis (calibrated, the default) or rtn (rounded to nearest)")
    if options.low_disk:
        raise UsageError("a budget needs the whole model on the disk", where=flag, hint="drop --low-disk")


@dataclass(frozen=True)
class Budget:
    """A run that is to have a size: the checkpoint, and what is asked of it.

    Args:
        source, model: open, and its skeleton.
        request, options: of the run.
        calibrated: whether layers are.
    """

    source: Source
    model: nn.Module | None
    request: Request
    options: RunOptions
    calibrated: bool

    def plan(self, rules: Recipe) -> Plan:
        """What rules make of the model."""
        made = make_plan(self.source, self.model, rules, shorten_groups=True)
        return made.kept_as(self._target().plain)

    def size(self, rules: Recipe) -> int:
        """Bytes of the files of weights."""
        found: int = self._target().size(self.plan(rules).contents())
        return found

    def _target(self) -> Any:
        return open_target(self.request.kind, Path("unused"), self.options.max_shard_bytes, self.source)


@dataclass(frozen=True)
class _Space:
    """What can be chosen.

    Args:
        budget: of the run.
        weights: that get one of CANDIDATES.
        unreached: weights that no text reaches, such as those of a vision tower: what errors cost there is not known.
    """

    budget: Budget
    weights: Sequence[Weight]
    unreached: Sequence[Site] = ()

    def rules(self, choice: Choice) -> Recipe:
        """The recipe of a choice; 8 bits for what is not reached."""
        how: Any = {"calibrated": self.budget.calibrated, "act": self.budget.request.wanted.act}
        made = choice.recipe(self.weights, **how)
        safe = tuple(CANDIDATES[-1].rule(site, **how) for site in self.unreached)
        return Recipe((*made.rules, *safe)).ignoring(self.budget.request.wanted.ignore)

    def size(self, choice: Choice) -> int:
        """Bytes of the files of weights."""
        return self.budget.size(self.rules(choice))


def budget_rules(budget: Budget) -> tuple[Recipe, str]:
    """The recipe that makes the folder no larger than asked for and loses least, and why.

    Raises:
        UsageError: no folder of the model is so small.
        BitfoldError: what errors cost cannot be measured, or is of another model.
    """
    kept = KeptPlan(budget.request, budget.options, budget.source, calibrated=budget.calibrated)
    found = kept.plan()
    rules, lines = found or _decided(budget, kept)
    if found is None:
        kept.keep_plan(rules, lines)
    for line in (*lines, *_table(budget.plan(rules))):
        progress.say(line)
    return rules, "; ".join(lines)


def _decided(budget: Budget, kept: KeptPlan) -> tuple[Recipe, list[str]]:
    """The recipe, and what is to be said of it."""
    decisions = _quantizable(budget)
    how: Any = {"calibrated": budget.calibrated, "act": budget.request.wanted.act}
    small = Recipe(tuple(CANDIDATES[0].rule(d.site, **how) for d in decisions)).ignoring(budget.request.wanted.ignore)
    _require_room(budget, small)  # before minutes are spent on measuring
    space = _space(budget, decisions, kept)
    smallest, largest = (everywhere(space.weights, i) for i in (0, len(CANDIDATES) - 1))
    numel, least, limit = _require_room(budget, space.rules(smallest))
    most = space.size(largest)
    if most <= limit:
        chosen, lines = largest, [f"more than 8 bits everywhere need: {size_text(most)}"]
    else:
        chosen, lines = _compared(space, _fitting(space, limit, least), limit)
    if space.unreached:
        lines.append(f"{len(space.unreached)} weights that no text reaches get {CANDIDATES[-1].format}")
    size = space.size(chosen)
    first = f"plan for {size_text(limit)}: {size_text(size)}, {8 * size / numel:.3f} bits per weight"
    return space.rules(chosen), [first, *lines]


def _require_room(budget: Budget, rules: Recipe) -> tuple[int, int, int]:
    """Weights of the model, bytes that the smallest rules take, bytes that there may be.

    Raises:
        UsageError: they take more.
    """
    numel, least = budget.plan(rules).numel, budget.size(rules)
    limit = budget.request.limit(numel)
    if least > limit:
        what = f"{size_text(limit)} are too few: the smallest that can be made of this model takes {least} bytes"
        raise UsageError(f"{what}, {_up(8 * least / numel)} bits per weight", where=budget.request.budget_flag)
    return numel, least, limit


def _up(bits: float) -> str:
    return f"{int(bits * 1000 + 1) / 1000:.3f}"


def _quantizable(budget: Budget) -> list[Quantized]:
    """What a run with bits would quantize."""
    wanted = budget.request.wanted
    rules = Recipe.of(CANDIDATES[0].format, transform="hadamard").ignoring(wanted.ignore)
    plan = make_plan(budget.source, budget.model, rules, shorten_groups=True)
    if not wanted.keep_embeddings:
        _, plan, _ = with_tables(budget.source, budget.model, rules, plan, budget.options.seed)
    if not plan.quantized:
        raise UsageError("nothing of this model is quantized", where=budget.request.budget_flag)
    return plan.quantized


def _space(budget: Budget, decisions: Sequence[Quantized], kept: KeptPlan) -> _Space:
    imatrix, known = _imatrix(budget, kept), named_as(budget.source)
    entries = {d.tensor: imatrix.entries.get(known(d.tensor)) for d in decisions}
    groups = grouped(entries, [])  # of experts: to one that is alone among them, no token came
    reached = {name for group in groups if any(entries[other] is not None for other in group) for name in group}
    if 2 * len(reached) < len(decisions):
        with_costs(None, (), next(name for name in entries if name not in reached))
    reader, found = whole_reader(budget.source, _model(budget)), []
    with progress.bar("try formats", len(reached)) as bar:
        for d in (d for d in decisions if d.tensor in reached):
            nothing = Importance(torch.ones(d.site.qshape[-1]), torch.zeros(d.site.qshape[-1]))
            entry = with_costs(entries[d.tensor] or nothing, d.site.qshape, d.tensor)
            found.append(weigh(d, entry, reader.read(d.tensor), budget.options.seed))
            bar.advance(1, d.tensor)
    return _Space(budget, found, [d.site for d in decisions if d.tensor not in reached])


def _model(budget: Budget) -> nn.Module:
    if budget.model is None:
        what = "what errors cost cannot be measured: transformers does not have the model's class"
        raise ModelError(what, where=budget.request.budget_flag, hint="--bits")
    return budget.model


def _imatrix(budget: Budget, kept: KeptPlan) -> Imatrix:
    if budget.request.imatrix is not None:
        return read_imatrix(budget.request.imatrix)
    text, seed = few(budget.request.text), budget.options.seed
    require_memory(_model(budget), budget.source, ceiling=budget.options.max_memory)
    return measured(budget.source, budget.model, text, seed, gradients=True, windows=kept)


def _fitting(space: _Space, limit: int, smallest: int) -> Choice:
    """Of least cost, with a whole that fits; headers take a few bytes more or less than those of the smallest."""
    shape, weights = walk_shape(space.budget.model), space.weights
    sharing = [group for block in shape.blocks for group in block.groups]
    sharing += [group for _, groups in shape.others for group in groups]
    groups, least = grouped([w.site.tensor for w in weights], sharing), sum(w.sizes[0] for w in weights)
    room = limit - (smallest - least)
    while True:
        found = least_cost(weights, groups, max(room, least))
        over = space.size(found) - limit
        if over <= 0:
            return found
        room -= over


def _compared(space: _Space, chosen: Choice, limit: int) -> tuple[Choice, list[str]]:
    """A choice, or the best uniform one of that size where a text says that this is better."""
    other = uniform(space.weights, lambda choice: space.size(choice) <= limit)
    lines = [f"reckoned loss, rounded to nearest: {chosen.cost(space.weights):.3g} nats a token"]
    if other is None:
        return chosen, lines
    same = " and ".join(sorted({CANDIDATES[i].format for i in other.picked.values()}))
    lines[0] += f"; {other.cost(space.weights):.3g} with {same} throughout, the best uniform plan of that size"
    try:
        kl, uniform_kl = _on_text(space, [chosen, other])
    except BitfoldError as error:
        return chosen, [*lines, f"not compared on text: {error.what}"]
    what = "KL on held-out text, noise of the size of each error in place of rounding"
    lines.append(f"{what}: {kl:.3g}; {uniform_kl:.3g} with the uniform plan")
    if kl <= uniform_kl:
        return chosen, lines
    return other, [*lines, "the uniform plan is better there, and is used"]


def _on_text(space: _Space, choices: Sequence[Choice]) -> list[float]:
    budget, weights = space.budget, space.weights
    model, text = _model(budget), few(budget.request.text)
    ids = tokens_of(budget.source, model, replace(text, nsamples=text.nsamples + _HELD_OUT))[text.nsamples :]
    if not len(ids):
        raise UsageError("the text is no longer than what was measured")
    require_memory(model, budget.source, copies=2, ceiling=budget.options.max_memory)
    reader = whole_reader(budget.source, model)
    pair = original(budget.source, reader), original(budget.source, reader)
    sites = {w.site.tensor: w.site for w in weights}
    errors: list[Mapping[str, float]] = [choice.errors(weights) for choice in choices]
    return noisy_divergences(*pair, sites, errors, ids, budget.options.seed)


def _table(plan: Plan) -> list[str]:
    """What is stored in which format, a line each."""
    count, size = Counter[str](), Counter[str]()
    for d in plan.written:
        name = d.format_name or "kept"
        name += " (embedding, head)" if isinstance(d, Quantized) and d.site.is_table else ""
        count[name] += 1
        size[name] += d.nbytes()
    return [f"  {name:<28} {count[name]:>5} tensors {size_text(size[name]):>9}" for name in sorted(count)]
