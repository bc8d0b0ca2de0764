"""Put quantized weights into a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from bitfold.checkpoints.schema import Entry
from bitfold.errors import BitfoldError, ModelError, UsageError
from bitfold.methods.quantize import quantize_tensor
from bitfold.models.eager_experts import one_expert_at_a_time
from bitfold.models.sites import EMBEDDING, EXPERTS, Site, find_sites
from bitfold.nn import QEmbedding, QLinear, QWeight, attach
from bitfold.qtensor import QTensor
from bitfold.recipes.recipe import Recipe
from bitfold.recipes.scheme import Scheme
from bitfold.system import progress
from bitfold.transforms import Diagonal, Hadamard, Transform


def swap(
    model: nn.Module, site: Site, qtensor: QTensor, *, act: str = "float", transform: Transform | None = None
) -> None:
    """Replace the weight of a site by a quantized one; tied aliases share it."""
    _give_saving(model, site.module)
    flat = site.experts is not None
    weight = QWeight(qtensor, act=act, transposed=site.transposed, transform=transform, flat=flat)
    weight.dtype = _float_dtype(model.get_submodule(site.module), site.parameter)
    placed: dict[int, nn.Module] = {}  # a module that is used twice is replaced by one, with one bias
    for name in (site.tensor, *site.aliases):
        path, _, parameter = name.rpartition(".")
        owner = model.get_submodule(path)
        if id(owner) in placed:
            _replace(model, path, placed[id(owner)])
        else:
            _place(model, path, owner, parameter, weight)
            placed[id(owner)] = model.get_submodule(path)
    first = model.get_submodule(site.module)
    object.__getattribute__(first, "__dict__").pop(site.parameter, None)
    setattr(first, site.parameter, weight)  # the first name owns the weight, the aliases refer to it


def _give_saving(model: nn.Module, path: str) -> None:
    """Let transformers' own `save_pretrained` write what the packed fields mean; that of other libraries is refused.

    It would write packed fields without a word of what they mean. PEFT's writes adapters alone.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None:
        from bitfold.models.hf_saving import give_saving

        give_saving(model, path)
    theirs = callable(getattr(type(model), "save_pretrained", None))
    adapters = any(kind.__module__.startswith("peft.") for kind in type(model).__mro__)
    if theirs and not adapters and (modeling is None or not isinstance(model, modeling.PreTrainedModel)):
        model.save_pretrained = _no_plain_saving  # type: ignore[assignment]


def _no_plain_saving(*_: object, **__: object) -> None:
    raise UsageError("this save_pretrained does not know packed weights", hint="bitfold.save(model, folder)")


def _float_dtype(owner: nn.Module, parameter: str) -> torch.dtype:
    old = owner._parameters.get(parameter)
    return old.dtype if old is not None else torch.float32


def _place(model: nn.Module, path: str, owner: nn.Module, parameter: str, weight: QWeight) -> None:
    plain_linear = type(owner).forward is nn.Linear.forward and type(owner) is nn.Linear
    if path and (plain_linear or type(owner).__name__ == "Conv1D"):
        bias = owner._parameters.get("bias")
        if type(owner).__name__ == "Conv1D":
            weight.transposed = False  # QLinear multiplies by (n, k) whatever the model's own layer stored
        _replace(model, path, QLinear(weight, bias))
    elif path and type(owner) is nn.Embedding:
        _replace(model, path, QEmbedding(weight, owner.padding_idx))
    else:
        # A class of its own (scaled embeddings, attention projections, expert stacks): it keeps its forward, and
        # QWeight answers the torch functions that the forward calls.
        owner._parameters.pop(parameter, None)  # gone already when a shared module comes by its second name
        attach(owner, weight, name=parameter)
        if len(weight.qshape) == 3:
            one_expert_at_a_time(owner)


def _replace(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    new.train(model.training)
    setattr(model.get_submodule(parent), child, new)


def swap_entries(model: nn.Module, entries: Mapping[str, Entry]) -> None:
    """Prepare a skeleton (on the meta device) for a quantized checkpoint.

    Raises:
        ModelError: an entry names a tensor that the model does not have, or with another shape.
    """
    sites = {name: site for site in find_sites(model) for name in (site.tensor, *site.aliases)}
    for name, entry in entries.items():
        site = sites.get(name)
        if site is None:
            raise ModelError("the checkpoint quantizes a tensor that this model does not have", where=name)
        site = replace(site, transposed=entry.transposed)
        if entry.shape != site.qshape or entry.flat != (site.experts is not None):
            raise ModelError(f"is {site.qshape} in the model and {entry.shape} in the checkpoint", where=name)
        swap(model, site, entry.meta(), act=entry.act, transform=entry.transform)


@dataclass(frozen=True)
class Outcome:
    """What happened to one tensor: `format` is None where it was kept, and `reason` says why."""

    tensor: str
    format: str | None
    reason: str


def decide(recipe: Recipe, site: Site) -> tuple[Scheme | None, str]:
    """How a site is quantized (None = it is kept) and the reason in words."""
    rule = recipe.find(site.tensor, default_keep=site.keep is not None)
    if rule is None:
        return None, f"{site.keep}, kept by default" if site.keep else "no rule matches"
    return rule.scheme, f"{'kept by the ' if rule.keep else ''}rule {rule.match!r}"


def quantize_(
    model: nn.Module, recipe: Recipe | str, *, seed: int = 0, on_tensor: Callable[[Outcome], None] | None = None
) -> list[Outcome]:
    """Quantize a module in place.

    Args:
        model: any module; its linear layers, Conv1D layers and expert stacks become quantized ones.
        recipe: rules, or the name of one format for everything.
        seed: for solvers that draw random numbers.
        on_tensor: called with each outcome as it happens.

    Returns:
        One outcome for each weight that could have been quantized.

    Raises:
        FormatError, WeightError: with the name of the tensor; what was done before stays done.
    """
    rules = Recipe.of(recipe) if isinstance(recipe, str) else recipe
    sites = find_sites(model)
    outcomes: list[Outcome] = []
    with progress.bar("quantize", sum(_numel(s) for s in sites)) as bar:
        for site in sites:
            outcome = _quantize_site(model, site, rules, seed)
            outcomes.append(outcome)
            bar.advance(_numel(site), site.tensor)
            if on_tensor is not None:
                on_tensor(outcome)
    return outcomes


def _quantize_site(model: nn.Module, site: Site, recipe: Recipe, seed: int) -> Outcome:
    scheme, reason = decide(recipe, site)
    if scheme is None:
        return Outcome(site.tensor, None, reason)
    owner = model.get_submodule(site.module)
    weight: torch.Tensor = getattr(owner, site.parameter)
    if scheme.format.plain:
        what = f"{scheme.format.name} is an ordinary dtype"
        raise UsageError(what, where=site.tensor, hint="cast the module: model.to(dtype)")
    if scheme.needs_text:
        raise UsageError("the rule needs calibration text", where=site.tensor, hint="use bitfold.quantize")
    qtensor = quantize_site_tensor(weight.detach(), site, scheme, seed)
    act = "float" if scheme.activations.measured else scheme.activations.name
    swap(model, site, qtensor, act=act, transform=transform_of(scheme, site, seed))
    return Outcome(site.tensor, qtensor.format.name, reason)


def quantize_site_tensor(
    w: torch.Tensor, site: Site, scheme: Scheme, seed: int, device: torch.device | None = None
) -> QTensor:
    """Quantize the weight of a site, inputs last, in the basis of the transform; errors name the tensor.

    Args:
        w, site, scheme, seed: the weight, and how.
        device: where to do it; None = where the weight is. What comes out is where the weight is.
    """
    try:
        rotated = in_basis(w if device is None else w.to(device), site, transform_of(scheme, site, seed))
        found = quantize_tensor(rotated, scheme.format, method=scheme.solver, fit=scheme.fit, seed=seed)
        return found if rotated.device == w.device else found.to(w.device)
    except BitfoldError as error:
        raise type(error)(error.what, where=site.tensor, hint=error.hint) from error


def transform_of(scheme: Scheme, site: Site, seed: int) -> Transform | None:
    """The transform that is wanted for a site; one that calibration has still to choose changes nothing."""
    size = site.qshape[-1]
    if scheme.transform.diagonal:
        return Diagonal.stored(torch.ones(size))
    return Hadamard(size, seed) if scheme.transform.rotates else None


def in_basis(w: torch.Tensor, site: Site, transform: Transform | None) -> torch.Tensor:
    """A model's weight as it is quantized: inputs last, transformed."""
    oriented = site.oriented(w)
    return oriented if transform is None else transform.weights(oriented.float())


def _numel(site: Site) -> int:
    count = 1
    for size in site.shape:
        count *= size
    return count


__all__ = ["EMBEDDING", "EXPERTS", "Outcome", "decide", "quantize_", "swap", "swap_entries"]
