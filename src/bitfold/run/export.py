"""Runs that end in another program's checkpoint: the rules that it means for this model."""

from __future__ import annotations

from collections.abc import Callable

from bitfold.checkpoints import Source
from bitfold.checkpoints.gguf.mixtures import PLAIN_TYPES, base_type
from bitfold.checkpoints.repack import fallbacks, mixture_of
from bitfold.checkpoints.targets import ENGINES, GGUF
from bitfold.errors import UsageError
from bitfold.recipes.recipe import Recipe, Rule
from bitfold.run.engine_export import check_engine_options, engine_rules
from bitfold.run.options import Request

_METHODS = ("rtn", "ldlq", "gptq")
_PLAIN = {"f16": "fp16", "bf16": "bf16", "f32": "fp32"}
_FINE = ("q6_k", "q8_0", *PLAIN_TYPES)  # types that lose next to nothing however they are rounded
_ENDS = ("model.embed_tokens.weight", "lm_head.weight")  # fine types, and as large as all layers of a small model


def check_export(request: Request, *, upload: bool) -> None:
    """Raise what can be known before anything is opened.

    Raises:
        UsageError: an unknown type, or options that say otherwise than it does.
    """
    kind, _, mixture = (request.export or "").partition(":")
    if kind in ENGINES and not mixture:
        check_engine_options(request.wanted)
        return
    if kind != GGUF or not mixture:
        hint = f"gguf:TYPE, as in gguf:Q4_K_M, or {', '.join(ENGINES)}"
        raise UsageError(f"cannot export {request.export!r}", where="--export", hint=hint)
    base_type(mixture)
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
    request: Request, source: Source, why_not: Callable[[], str | None]
) -> tuple[Recipe, str, tuple[str, ...]]:
    """The rules of a mixture, tensor by tensor; the method and why; what gets another type than the mixture wants.

    Args:
        request: with what is to be exported.
        source: open.
        why_not: asked where it matters: what stands in the way of calibration, in words; None if nothing does.
    """
    if not single_file(request):
        return engine_rules(request, source, why_not)
    mixture = (request.export or "").partition(":")[2]
    tied = bool(source.config.get("tie_word_embeddings"))
    names = [name for name in source.names() if not (tied and name == _ENDS[1])]
    shapes = {name: source.info(name).shape for name in names}
    types = mixture_of(source, shapes, mixture)
    method, why = _method(request.wanted.method, base_type(mixture), why_not)
    rules = []
    for name, choice in types.items():
        if len(shapes[name]) < 2:
            continue
        if choice.type in PLAIN_TYPES or name in _ENDS or method == "rtn":
            rules.append(Rule(name, _PLAIN.get(choice.type, choice.type)))
        else:
            rules.append(Rule(name, choice.type, method, transform="none"))
    return Recipe(tuple(rules)).ignoring(request.wanted.ignore), why, tuple(fallbacks(types, shapes))


def _method(said: str | None, base: str, why_not: Callable[[], str | None]) -> tuple[str, str]:
    if said not in (None, "auto"):
        return said, ""
    if base in _FINE:
        return "rtn", f"rtn: {base.upper()} loses little without calibration"
    obstacle = why_not()
    if obstacle is not None:
        return "rtn", f"rtn, without calibration: {obstacle}"
    return "ldlq", "ldlq: scales for the inputs that matter, errors fed forward"
