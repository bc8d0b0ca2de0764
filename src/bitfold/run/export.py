"""Runs that end in another program's checkpoint: the rules that it means for this model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import nn

from bitfold.checkpoints import Source
from bitfold.checkpoints.gguf.container import parts_bytes
from bitfold.checkpoints.gguf.imatrix import read_imatrix
from bitfold.checkpoints.gguf.mixtures import PLAIN_TYPES, Typed, base_type
from bitfold.checkpoints.repack import fallbacks, mixture_of
from bitfold.checkpoints.targets import ENGINES, GGUF
from bitfold.errors import UsageError
from bitfold.models.mapping import map_names
from bitfold.recipes.recipe import Recipe, Rule
from bitfold.run.engine_export import check_engine_options, engine_rules
from bitfold.run.importance import few, measured, whole_reader
from bitfold.run.mixture import own_mixture, require_room
from bitfold.run.options import Request, RunOptions
from bitfold.system import progress
from bitfold.system.units import size_text

OWN = "auto"  # no mixture of llama.cpp's: types chosen for a size
_METHODS = ("rtn", "ldlq", "gptq")
_PLAIN = {"f16": "fp16", "bf16": "bf16", "f32": "fp32"}
_FINE_HEADS = ("q8_0",)  # which lose less than their inputs rounded to 8 bits do
_HEAD_DAMP = 0.1  # what is the embedding as well loses by the plain size of its errors
_FINE = ("q6_k", "q8_0", *PLAIN_TYPES)  # types that lose next to nothing however they are rounded
_ENDS = ("model.embed_tokens.weight", "lm_head.weight")  # fine types, and as large as all layers of a small model


def check_export(request: Request, *, upload: bool) -> None:
    """Raise what can be known before anything is opened.

    Raises:
        UsageError: an unknown type, or options that say otherwise than it does.
    """
    kind, _, mixture = (request.export or "").partition(":")
    if kind in ENGINES and not mixture:
        if request.budget_flag is not None or request.imatrix is not None:
            what = "formats are chosen for a size in bitfold's own folders and in GGUF files"
            raise UsageError(what, where=request.budget_flag or "--imatrix", hint="no --export, or gguf:auto")
        check_engine_options(request.wanted)
        return
    if kind != GGUF or not mixture:
        hint = f"gguf:TYPE, as in gguf:Q4_K_M, or {', '.join(ENGINES)}"
        raise UsageError(f"cannot export {request.export!r}", where="--export", hint=hint)
    if (mixture == OWN) != (request.budget_flag is not None):
        hint = "--export gguf:auto --target-size 100MB"
        raise UsageError("a size and gguf:auto go together", where=request.budget_flag or "--target-size", hint=hint)
    if mixture != OWN:
        base_type(mixture)
        if request.imatrix is not None:
            what, hint = "error feedback measures its own inputs", "--export gguf:auto chooses types by it"
            raise UsageError(what, where="--imatrix", hint=hint)
    wanted = request.wanted
    if said := [flag for flag in wanted.given() if flag != "--method"]:
        raise UsageError(f"{request.export} already says what {', '.join(said)} would say", hint="drop one of them")
    method = (wanted.method or "ldlq").partition(":")[0]
    if method not in (*_METHODS, "auto"):
        what = f"the types of GGUF cannot be made by {method}"
        raise UsageError(what, where="--method", hint=f"one of {', '.join(_METHODS)}")
    if upload:
        raise UsageError("a GGUF file cannot be published from here yet", where="--upload-repo")


def single_file(request: Request) -> bool:
    """Whether one file is made, not a folder."""
    return (request.export or "").partition(":")[0] == GGUF


def export_rules(
    request: Request, source: Source, model: nn.Module | None, options: RunOptions, why_not: Callable[[], str | None]
) -> tuple[Recipe, str, tuple[str, ...]]:
    """The rules of a mixture, tensor by tensor; the method and why; what gets another type than the mixture wants.

    Args:
        request: with what is to be exported.
        source: open.
        model: its skeleton.
        options: the seed of what is drawn to measure what errors cost, the size at which a new file is begun.
        why_not: asked where it matters: what stands in the way of calibration, in words; None if nothing does.
    """
    if not single_file(request):
        return engine_rules(request, source, why_not)
    mixture = (request.export or "").partition(":")[2]
    tied = bool(source.config.get("tie_word_embeddings"))
    shapes = {name: s for name, s in _shapes(source, model).items() if not (tied and name == _ENDS[1])}
    if mixture == OWN:
        types, cost = _own(request, source, model, shapes, options)
        method, why = _method(request.wanted.method, "", why_not)
        why = f"{why or method}; types chosen for {size_text(_limit(request, shapes))}: {_counted(types)}; reckoned"
        why = f"{why} loss of rounding to nearest: {cost:.3g} nats a token"
        progress.say(why)
    else:
        types = mixture_of(source, shapes, mixture)
        method, why = _method(request.wanted.method, base_type(mixture), why_not)
    rules = []
    for name, choice in types.items():
        if len(shapes[name]) < 2:
            continue
        own = _method_of(name, choice.type, method, head=_ENDS[0] if tied else _ENDS[1])
        if own == "rtn":
            rules.append(Rule(name, _PLAIN.get(choice.type, choice.type)))
        else:
            rules.append(Rule(name, choice.type, own, transform="none"))
    return Recipe(tuple(rules)).ignoring(request.wanted.ignore), why, tuple(fallbacks(types, shapes))


def _shapes(source: Source, model: nn.Module | None) -> dict[str, tuple[int, ...]]:
    """Of the tensors of the model: experts that the checkpoint has one by one are stacks there."""
    stored: dict[str, torch.Tensor] = {} if model is None else model.state_dict()
    found: dict[str, tuple[int, ...]] = {}
    for target in map_names(source.names(), model):
        own = {name: tuple(stored[name].shape) for name in target.names if name in stored}
        found |= {target.names[0]: source.info(target.sources[0]).shape} if target.converter is None else own
    return found


def _method_of(name: str, type: str, method: str, *, head: str) -> str:
    """By which a tensor is made: the output head with error feedback as well, an embedding that is none rounded."""
    if type in PLAIN_TYPES or method == "rtn" or name in set(_ENDS) - {head}:
        return "rtn"
    if name != head:
        return method
    return "rtn" if type in _FINE_HEADS else method if ":" in method else f"{method}:{_HEAD_DAMP}"


def _own(
    request: Request,
    source: Source,
    model: nn.Module | None,
    shapes: Mapping[str, tuple[int, ...]],
    options: RunOptions,
) -> tuple[dict[str, Typed], float]:
    """bitfold's own mixture of a size, and its reckoned loss."""
    limit = _limit(request, shapes)
    budget = limit - parts_bytes(limit, options.max_shard_bytes)
    if request.imatrix is not None:
        found = read_imatrix(request.imatrix)
    else:
        require_room(source, shapes, budget)  # before minutes are spent on measuring
        found = measured(source, model, few(request.text), options.seed, gradients=True)
    read = source.read if model is None else whole_reader(source, model).read
    return own_mixture(source, read, shapes, found, budget)


def _limit(request: Request, shapes: Mapping[str, tuple[int, ...]]) -> int:
    return request.limit(sum(map(prod, shapes.values())))


def _counted(types: Mapping[str, Typed]) -> str:
    counts = Counter(choice.type for choice in types.values() if choice.type != "f32")
    return ", ".join(f"{count} {name.upper()}" for name, count in sorted(counts.items()))


def _method(said: str | None, base: str, why_not: Callable[[], str | None]) -> tuple[str, str]:
    if said not in (None, "auto"):
        return said, ""
    if base in _FINE:
        return "rtn", f"rtn: {base.upper()} loses little without calibration"
    obstacle = why_not()
    if obstacle is not None:
        return "rtn", f"rtn, without calibration: {obstacle}"
    return "ldlq", "ldlq: scales for the inputs that matter, errors fed forward"
