"""Layers that share their input, solved together: one Hessian, one change of basis, one factorization.

Their weights are stacked, rows upon rows, wherever the format lets rows be taken apart again: a coder then gets enough
rows to fill its vectors, and the feedback runs once instead of once for each layer. No number changes by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from bitfold.calibration.channel_factors import find_factors
from bitfold.calibration.coding import Coder, Coding, code, share_of
from bitfold.calibration.fallback import Fallback, recoverable
from bitfold.calibration.one_layer import solve
from bitfold.calibration.statistics import Statistics
from bitfold.methods.gptq import proxy_loss
from bitfold.methods.hessian import Moments, widest
from bitfold.models.folding import folded_norm
from bitfold.models.sites import EXPERTS
from bitfold.models.swap import in_basis, transform_of
from bitfold.nn import set_tensor
from bitfold.planning.decisions import Decision, Quantized
from bitfold.qtensor import QTensor, split_rows, stack
from bitfold.recipes.scheme import Scheme
from bitfold.system.backend import CPU
from bitfold.transforms import Diagonal, Transform
from bitfold.transforms.activations import ACT_SCALE

_WIDEST = 256.0  # factor of a row before whose scales are stored in 16 bits
_FEW = 4  # fewer tokens than a layer's inputs divided by this say too little about them


@dataclass(frozen=True)
class Solved:
    """One layer done.

    Args:
        decision: which.
        qtensor: what it is now.
        weight: what it was, in the same basis.
        output_error: relative square error of its output under the calibration text; None without data.
        sides: tensors stored beside it.
        flags: what went otherwise than it should.
        coded: relative square error of the codes, where they aim at another weight than it was (drift correction).
    """

    decision: Quantized
    qtensor: QTensor
    weight: torch.Tensor
    output_error: float | None
    sides: Mapping[str, torch.Tensor] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    coded: float | None = None


@dataclass(frozen=True)
class Folded:
    """A parameter of a norm, or a bias, that took over factors of the layers behind it, as it is to be stored."""

    decision: Decision
    value: torch.Tensor


@dataclass(frozen=True)
class SharedInput:
    """What is to be solved together.

    Args:
        model: with the weights of these layers in memory, float32; it gets the quantized ones.
        decisions: one for each layer; or a single one, for a stack of experts.
        statistics: of their input; one for each expert of a stack, which may be measured only when it is asked for.
        before: decisions about the parameters of the norm or layer that takes their factors, by name of the parameter.
        feeding: that layer as it was solved, if it is one.
        code: codes rows; others may help it.
    """

    model: nn.Module
    decisions: Sequence[Quantized]
    statistics: Iterable[Statistics]
    before: Mapping[str, Decision] = field(default_factory=dict)
    feeding: Solved | None = None
    code: Coder = code


def solve_group(
    group: SharedInput, *, drift: float, seed: int, refit: bool = True
) -> Iterator[Solved | Folded | Fallback]:
    """Quantize the layers of one input; without data, and with a word about it, where calibration fails.

    Args:
        group: the layers. The layer before them that took their factors, if one did, is yielded again as it is then.
        drift: strength of the drift correction, 0 to 1.
        seed: of rotations and solvers.
        refit: of the row scales, see `ldlq`.

    Raises:
        BitfoldError: with the name of the tensor.
    """
    if group.decisions[0].site.kind == EXPERTS:
        yield from _solve_stack(group, _SolveOptions(0.0, seed, last=True, refit=refit))
        return
    (statistics,) = group.statistics
    left = list(group.decisions)
    for scheme in dict.fromkeys(d.scheme for d in group.decisions):
        left = [d for d in left if d.scheme != scheme]
        alike = [d for d in group.decisions if d.scheme == scheme]
        yield from _solve_alike(group, statistics, alike, _SolveOptions(drift, seed, not left, refit))


@dataclass(frozen=True)
class _SolveOptions:
    """Strength of the drift correction, seed, whether the statistics may be used up and row scales are refitted."""

    drift: float
    seed: int
    last: bool
    refit: bool


def _solve_alike(
    group: SharedInput, statistics: Statistics, decisions: list[Quantized], options: _SolveOptions
) -> Iterator[Solved | Folded | Fallback]:
    """Layers of one input under one scheme; without data where it cannot be done with them."""
    scheme, weights = decisions[0].scheme, [_weight(group.model, d) for d in decisions]
    shapes = tuple((d.site.qshape[0], d.site.qshape[1]) for d in decisions)
    failure: Exception | None = None
    try:
        transform, folded = _basis(group, statistics, decisions, weights, options.seed)
    except Exception as error:
        failure = recoverable(error)
        transform, folded = transform_of(scheme, decisions[0].site, options.seed), []
    yield from folded
    few, names = too_few(statistics), tuple(d.tensor for d in decisions)
    coding = Coding(
        scheme,
        names,
        shapes,
        transform,
        statistics,
        bool(few),
        options.drift,
        options.seed,
        options.refit,
        options.last,
    )
    whole = torch.cat(weights) if len(weights) > 1 else weights[0]
    if failure is None:
        try:
            coded = group.code(coding, whole)
        except Exception as error:
            failure = recoverable(error)
    if failure is not None:
        fallback = Fallback(", ".join(names), "quantized without data", failure)
        yield fallback
        few = (f"{fallback.instead}: {fallback.why}",)
        coded = code(replace(coding, statistics=None, drift=0.0), whole)
    del whole
    sides = {} if decisions[0].fold is not None or transform is None else transform.fields()
    sides = {**sides, **_act_scale(scheme, statistics, transform)}
    sizes = [n for n, _ in shapes]
    apart = torch.split(coded.apart, sizes)
    losses = [None] * len(sizes) if few or coded.losses is None else torch.split(coded.losses, sizes)
    qs = split_rows(coded.qs[0], shapes) if coding.stacked else coded.qs
    for decision, w, q, lost, aside in zip(decisions, weights, qs, losses, apart, strict=True):
        decoded = q.dequantize()
        was = w if transform is None else transform.weights(w)
        _put(group.model, decision, decoded if transform is None else transform.inverse(decoded))
        loss, flags = None if lost is None else share_of(lost), (*few, *coded.flags)
        yield Solved(
            decision, q.to(CPU), was.to(CPU), loss, sides, flags, share_of(aside) if options.drift > 0 else None
        )


def too_few(statistics: Statistics) -> tuple[str, ...]:
    """Why a layer is quantized without data, in words; nothing if it is not."""
    if statistics.tokens < widest(statistics.hessian) // _FEW:
        return (f"quantized without data: {statistics.tokens} tokens reached it",)
    if statistics.tokens and float(statistics.hessian.diagonal().max()) == 0:  # any weight would do as well as its own
        return ("quantized without data: its inputs are all zero under the calibration text",)
    return ()


def _basis(
    group: SharedInput, statistics: Statistics, decisions: list[Quantized], weights: list[torch.Tensor], seed: int
) -> tuple[Transform | None, list[Solved | Folded]]:
    """The transform, and what took it over: the parameters of the norm before, or the layer before."""
    scheme, fold = decisions[0].scheme, decisions[0].fold
    if not scheme.transform.diagonal:
        return transform_of(scheme, decisions[0].site, seed), []
    scale = find_factors(scheme.transform, weights, statistics, scheme.format)
    scale = torch.ones(weights[0].shape[1]) if scale is None else scale
    if fold is None:
        return Diagonal.stored(scale), []
    return _fold_norm(group, fold, scale) if group.feeding is None else _fold_rows(group, scale)


def _fold_rows(group: SharedInput, scale: torch.Tensor) -> tuple[Diagonal, list[Solved | Folded]]:
    """Factors in the rows of the layer before, as far as its scales can store them."""
    assert group.feeding is not None
    q, wished = group.feeding.qtensor, scale.clamp(1 / _WIDEST, _WIDEST)[:, None]
    format: Any = q.format  # the plan saw to it that it can
    after = QTensor(q.format, q.shape, format.rescaled(q.fields, wished))
    old, new = q.dequantize(), after.dequantize()
    energy = old.square().sum(1)
    effective = torch.where(energy > 0, (old * new).sum(1) / energy.clamp_min(1e-30), wished[:, 0])
    done: list[Solved | Folded] = [
        replace(group.feeding, qtensor=after, weight=group.feeding.weight * effective[:, None])
    ]
    if (bias := group.before.get("bias")) is not None:
        value = group.model.get_parameter(bias.tensor).detach() * effective
        done.append(Folded(bias, value.to(bias.info.dtype)))
    return Diagonal(len(scale), effective), done


def _fold_norm(group: SharedInput, path: str, scale: torch.Tensor) -> tuple[Diagonal, list[Solved | Folded]]:
    """Factors as the norm can store them: what it will multiply by, over what it multiplied by."""
    norm: Any = group.model.get_submodule(path)
    found = folded_norm(norm, scale)
    assert found is not None, "the plan tried this norm on random parameters"
    changed, added = found
    stored = {name: value.to(group.before[name].info.dtype) for name, value in changed.items()}
    exact = (stored["weight"].float() + added) / (norm.weight.detach().float() + added)
    effective = torch.where(torch.isfinite(exact) & (exact > 0), exact, 1.0)
    return Diagonal(len(scale), effective), [Folded(group.before[name], value) for name, value in stored.items()]


def _act_scale(scheme: Scheme, statistics: Statistics, transform: Transform | None) -> dict[str, torch.Tensor]:
    """The one scale of static activations."""
    if not scheme.activations.static:
        return {}
    absmax = torch.zeros(1) if statistics.absmax is None else statistics.absmax
    largest = absmax if transform is None else transform(absmax)
    return {ACT_SCALE: (largest.amax() / 127).reshape(1).to(CPU)}


def _solve_stack(group: SharedInput, options: _SolveOptions) -> Iterator[Solved | Fallback]:
    """A stack of experts, each under the Hessian of the tokens that were sent to it; or without data, if that fails."""
    (decision,) = group.decisions
    scheme, whole = decision.scheme, _weight(group.model, decision)
    transform = transform_of(scheme, decision.site, options.seed)
    stacked = whole if transform is None else transform.weights(whole)
    try:
        qs, losses, flags = _solve_experts(group, stacked, transform, options)
    except Exception as error:
        fallback = Fallback(decision.tensor, "quantized without data", recoverable(error))
        yield fallback
        found = [solve(scheme, w, None, options.seed, decision.tensor, refit=options.refit) for w in stacked]
        qs, losses, flags = [q for q, _ in found], [], [f"{fallback.instead}: {fallback.why}"]
    q = stack(qs)
    decoded = q.dequantize()
    _put(group.model, decision, decoded if transform is None else transform.inverse(decoded))
    yield Solved(
        decision, q.to(CPU), stacked.to(CPU), sum(losses) / len(losses) if losses else None, flags=tuple(flags)
    )


def _solve_experts(
    group: SharedInput, stacked: torch.Tensor, transform: Transform | None, options: _SolveOptions
) -> tuple[list[QTensor], list[float], list[str]]:
    """Each expert, what it lost where there are data, and what went otherwise than it should."""
    (decision,) = group.decisions
    qs, losses, flags = list[QTensor](), list[float](), list[str]()
    for expert, (w, statistics) in enumerate(zip(stacked, group.statistics, strict=True)):
        few = too_few(statistics)
        hessian = statistics.hessian if transform is None else transform.hessian(_dense(statistics.hessian))
        name = f"{decision.tensor}, expert {expert}"
        q, odd = solve(decision.scheme, w, None if few else hessian, options.seed, name, refit=options.refit)
        qs.append(q)
        flags += [f"expert {expert}: {flag}" for flag in (*few, *odd)]
        losses += [] if few else [proxy_loss(w, q.dequantize(), hessian)]
    return qs, losses, flags


def _dense(hessian: Moments) -> torch.Tensor:
    assert isinstance(hessian, torch.Tensor), "experts are measured whole"
    return hessian


def _weight(model: nn.Module, decision: Quantized) -> torch.Tensor:
    """(n, k) or (experts, n, k) float32, inputs last."""
    owner: Any = model.get_submodule(decision.site.module)
    return in_basis(owner._parameters[decision.site.parameter].detach(), decision.site, None).float()


def _put(model: nn.Module, decision: Quantized, w: torch.Tensor) -> None:
    set_tensor(model, decision.site.tensor, decision.site.restored(w))
