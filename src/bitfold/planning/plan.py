"""The plan of a run: for every tensor of the source what will become of it, before anything is read."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from bitfold.checkpoints import Source
from bitfold.checkpoints.schema import Content, Entry
from bitfold.errors import BitfoldError, FormatError, ModelError
from bitfold.formats import rows_rescale, scaled_by_row
from bitfold.methods.quantize import check_block
from bitfold.models.folding import find_folds, scales_with_weight
from bitfold.models.mapping import Target, map_names
from bitfold.models.sites import LINEAR, Site, find_sites, guess_sites
from bitfold.models.skeleton import tied_names
from bitfold.models.swap import decide
from bitfold.planning.decisions import Decision, Kept, Packed, Quantized, Tied, Unused
from bitfold.recipes.recipe import Recipe
from bitfold.records.run_report import PACKED_ALREADY
from bitfold.system.tensorinfo import TensorInfo
from bitfold.transforms import TransformSpec

NO_SITE = "not the weight of a linear layer, embedding or expert stack"


@dataclass(frozen=True)
class Item:
    """Tensors of the model that are made together from tensors of the source."""

    target: Target
    decisions: Mapping[str, Decision]


@dataclass(frozen=True)
class Plan:
    """All items of a run."""

    items: tuple[Item, ...]

    @property
    def decisions(self) -> list[Decision]:
        """Every tensor of the model, in the order of writing."""
        return [d for item in self.items for d in item.decisions.values()]

    @property
    def written(self) -> list[Kept | Unused | Packed | Quantized]:
        """What is stored: all but tied tensors."""
        return [d for d in self.decisions if not isinstance(d, Tied)]

    @property
    def quantized(self) -> list[Quantized]:
        """What is quantized."""
        return [d for d in self.decisions if isinstance(d, Quantized)]

    @property
    def numel(self) -> int:
        """Numbers to be written."""
        return sum(d.info.numel for d in self.written)

    def kept_as(self, plain: Callable[[TensorInfo], TensorInfo]) -> Plan:
        """With what is not quantized in the dtype that the output has for it."""
        items = []
        for item in self.items:
            kept = {n: d for n, d in item.decisions.items() if isinstance(d, Kept | Unused)}
            changed = {name: replace(d, info=plain(d.info)) for name, d in kept.items()}
            items.append(Item(item.target, {**item.decisions, **changed}))
        return Plan(tuple(items))

    def contents(self) -> dict[str, Content]:
        """What every tensor is stored as, in the order of the source."""
        found = ((d.tensor, d.content()) for d in self.decisions)
        return {name: content for name, content in found if content is not None}

    def entries(self, seed: int, auto: str = "float") -> dict[str, Entry]:
        """Entries of the quantized tensors; `auto` stands for activations that were left to measurement."""
        packed = {d.tensor: d.stored for d in self.decisions if isinstance(d, Packed)}
        found = ((d.tensor, d.entry(seed, auto)) for d in self.quantized)
        return {**packed, **{name: entry for name, entry in found if entry is not None}}

    def unused(self) -> list[str]:
        """Tensors that are carried along although the model class has no place for them."""
        return [d.tensor for d in self.decisions if isinstance(d, Unused)]


def make_plan(source: Source, model: nn.Module | None, recipe: Recipe, *, shorten_groups: bool) -> Plan:
    """Decide what becomes of every tensor.

    Args:
        source: the open checkpoint.
        model: its skeleton, or None when the class is unknown (tensors are then judged by name and shape).
        recipe: the rules.
        shorten_groups: in rows shorter than the group of a format use one scale a row instead of raising.

    Raises:
        FormatError: a format that cannot hold a tensor, named.
        ModelError: the checkpoint lacks tensors of the model.
    """
    targets = map_names(source.names(), model)
    infos, packed = _infos(source, targets, model), _packed(source, targets)
    sites = find_sites(model) if model is not None else guess_sites(infos, source.config)
    by_name = {site.tensor: site for site in sites}
    aliases = {alias: site.tensor for site in sites for alias in site.aliases}
    if model is not None:
        aliases.update(tied_names(model))
    items = []
    for target in targets:
        decisions: dict[str, Decision] = {}
        for name in target.names:
            if name in packed:
                decisions[name] = Packed(name, infos[name], PACKED_ALREADY, packed[name])
                continue
            decision = _decide(name, infos, by_name, aliases, recipe, target.used)
            decisions[name] = _fitting(decision, shorten_groups) if isinstance(decision, Quantized) else decision
        items.append(Item(target, decisions))
    plan = place_factors(Plan(tuple(items)), model)
    _warn_of_idle_rules(plan, recipe)
    return plan


def plan_sites(model: nn.Module, recipe: Recipe, *, shorten_groups: bool) -> list[Quantized]:
    """What is quantized of a model whose checkpoint somebody else reads; see `make_plan`."""
    found = []
    for site in find_sites(model):
        scheme, reason = decide(recipe, site)
        if scheme is not None:
            info = TensorInfo(model.get_submodule(site.module).get_parameter(site.parameter).dtype, site.shape)
            found.append(_fitting(Quantized(site.tensor, info, reason, site, scheme), shorten_groups))
    return found


def _fitting(decision: Quantized, shorten_groups: bool) -> Quantized:
    fitting = _shorten(decision) if shorten_groups else decision
    _check(fitting)
    return fitting


def _warn_of_idle_rules(plan: Plan, recipe: Recipe) -> None:
    """A rule that matches nothing is most often a typing error."""
    names = [d.tensor for d in plan.decisions]
    for rule in recipe.rules:
        if not any(rule.matches(name) for name in names):
            warnings.warn(f"the rule {rule.match!r} matches no tensor of this model", stacklevel=3)


def _packed(source: Source, targets: list[Target]) -> dict[str, Entry]:
    """What is quantized in the source, by the name of the model's tensor."""
    if source.quantization is None:
        return {}
    found: dict[str, Entry] = {}
    for target in targets:
        for name, content in ((name, source.content(name)) for name in target.sources):
            if not isinstance(content, Entry):
                continue
            if target.converter is not None:
                hint = "quantize the original as a whole"
                raise ModelError("is packed, and its model has it as part of a stack", where=name, hint=hint)
            found[target.names[0]] = content
    return found


def _infos(source: Source, targets: list[Target], model: nn.Module | None) -> dict[str, TensorInfo]:
    """What each tensor of the model will be: the source's dtype, and the model's shape where tensors are combined."""
    stored = {} if model is None else model.state_dict()
    # A GGUF file yields float32 whatever it stores; what is kept of it goes into the dtype of the model.
    instead = source.model_dtype
    infos = {}
    for target in targets:
        first = source.info(target.sources[0])
        for name in target.names:
            shape = tuple(stored[name].shape) if target.converter is not None else first.shape
            if name in stored and tuple(stored[name].shape) != tuple(shape):
                expected = tuple(stored[name].shape)
                raise ModelError(f"has shape {tuple(shape)}, its model has {expected}", where=name)
            infos[name] = TensorInfo(instead if instead and first.dtype.is_floating_point else first.dtype, shape)
    return infos


def _decide(
    name: str,
    infos: Mapping[str, TensorInfo],
    sites: Mapping[str, Site],
    aliases: Mapping[str, str],
    recipe: Recipe,
    used: bool,
) -> Decision:
    info = infos[name]
    if not used:
        return Unused(name, info, "the model class has no place for it")
    tied_to = aliases.get(name)
    if tied_to is not None and tied_to in infos:
        return Tied(name, info, f"tied to {tied_to}", tied_to)
    site = sites.get(name)
    if site is None:
        return Kept(name, info, _why_not(info))
    scheme, reason = decide(recipe, site)
    if scheme is None:
        return Kept(name, info, reason)
    return Quantized(name, info, reason, replace(site, shape=info.shape), scheme)


def _why_not(info: TensorInfo) -> str:
    if len(info.shape) < 2:
        return "a vector (norm, bias)"
    return NO_SITE


def _shorten(decision: Quantized) -> Quantized:
    format, width = decision.scheme.format, decision.site.qshape[-1]
    if format.scale is None or format.scale.block[1] <= width:
        return decision
    reason = f"{decision.reason}; rows of {width} are shorter than a group: one scale a row"
    return replace(decision, scheme=replace(decision.scheme, format=scaled_by_row(format)), reason=reason)


def _check(decision: Quantized) -> None:
    format = decision.scheme.format
    if wrong := decision.scheme.solver.misfit(format):
        raise FormatError(wrong, where=decision.tensor, hint="use --method rtn, or another format")
    try:
        check_block(decision.site.qshape, format)
        format.layout(decision.site.qshape)
    except BitfoldError as error:
        raise type(error)(error.what, where=decision.tensor, hint=error.hint) from error


def place_factors(plan: Plan, model: nn.Module | None) -> Plan:
    """Say which norms and layers take the factors of the layers behind them; stacks of experts go without factors."""
    decisions = {d.tensor: d for d in plan.decisions}
    wanting = {d.tensor: d for d in plan.quantized if d.scheme.transform.diagonal}
    if not wanting:
        return plan
    changed = {name: _without_factors(d) for name, d in wanting.items() if d.site.kind != LINEAR}
    for source, layers in ({} if model is None else find_folds(model)).items():
        behind = [wanting.get(f"{layer}.weight") for layer in layers]
        schemes = {d.scheme for d in behind if d is not None}
        own = {name.rpartition(".")[2]: d for name, d in decisions.items() if name.rpartition(".")[0] == source}
        if None in behind or len(schemes) != 1 or model is None or not _same_block(source, layers):
            continue
        if _takes_rows(own) or (_kept(own) and scales_with_weight(model.get_submodule(source))):
            changed |= {d.tensor: replace(d, fold=source) for d in behind if d is not None}
    items = [
        Item(item.target, {name: changed.get(name, d) for name, d in item.decisions.items()}) for item in plan.items
    ]
    return Plan(tuple(items))


def _kept(own: Mapping[str, Decision]) -> bool:
    """Whether a norm goes into the output with nothing but its factors changed."""
    vector = all(len(d.info.shape) == 1 for d in own.values())
    return bool(own) and vector and all(isinstance(d, Kept) for d in own.values())


def _takes_rows(own: Mapping[str, Decision]) -> bool:
    """Whether a linear layer is solved before the layer behind it, and keeps a scale for each row."""
    weight, others = own.get("weight"), {name: d for name, d in own.items() if name != "weight"}
    if not isinstance(weight, Quantized) or not set(others) <= {"bias"}:
        return False
    scheme, site = weight.scheme, weight.site
    solved = scheme.needs_text and not scheme.solver.tunes_blocks and site.kind == LINEAR
    plain = not site.transposed and not site.aliases
    return solved and plain and rows_rescale(scheme.format) and (not others or _kept(others))


def _without_factors(decision: Quantized) -> Quantized:
    reason = f"{decision.reason}; no factors for stacks of experts"
    return replace(decision, scheme=replace(decision.scheme, transform=TransformSpec("none")), reason=reason)


def _same_block(norm: str, layers: tuple[str, ...]) -> bool:
    """Blocks are calibrated one by one, each with its own tensors in memory."""
    found = re.match(r".*?\.\d+\.", norm)
    return found is not None and all(layer.startswith(found[0]) for layer in layers)
