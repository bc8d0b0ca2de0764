"""Models without their weights: parameters on the meta device, small computed buffers real.

A model is built from its config with every parameter moved to the meta device as soon as it is registered, and with
initialisation switched off, so that nothing of the model's size is ever touched. Buffers that are computed and not
stored (rotary frequencies, position ids) come out right, because their constructors really run.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from bitfold.errors import CheckpointError, ModelError

_MOST_MODULES = 10_000
_NOT_IN_JSON = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
_COUNTS = re.compile(r"(layers?|experts)$")


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within this context every nn.Parameter that a module registers is moved to the meta device."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, param)
        if param is not None and param.device.type != "meta":
            meta = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            self._parameters[name] = meta

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        with _no_init():
            yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _no_init() -> Iterator[None]:
    """Initialisers would touch the memory that torch.empty only promises."""
    names = [n for n in dir(nn.init) if n.endswith("_") and not n.startswith("_") and callable(getattr(nn.init, n))]
    saved: dict[str, Callable[..., Any]] = {n: getattr(nn.init, n) for n in names}
    try:
        for name in names:
            setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
        yield
    finally:
        for name, function in saved.items():
            setattr(nn.init, name, function)


def model_class(config: Mapping[str, Any]) -> Any | None:
    """The transformers class that a config asks for; None when transformers does not have it (custom code)."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    for name in architectures(config) or _usual_classes(str(config.get("model_type"))):
        found = getattr(transformers, name, None)
        if isinstance(found, type):
            return found
    return None


def architectures(config: Mapping[str, Any]) -> list[str]:
    """The classes that a config names: a list, or one name alone; none where it names none."""
    named = config.get("architectures")
    return [named] if isinstance(named, str) else [str(name) for name in named or []]


def _usual_classes(model_type: str) -> list[str]:
    """Names of classes for a config that names none.

    The whole comes before a part of it: Marian's decoder and Mllama's text model have causal classes of their own.
    Else what predicts tokens comes first, and encoders are filled in.
    """
    from transformers.models.auto import modeling_auto as auto

    tables: list[Mapping[str, Any]] = [auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES]
    if model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        tables.reverse()  # BERT and its like are in both
    whole = [auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES]
    tables = [*whole, *tables, auto.MODEL_MAPPING_NAMES]
    names = [table.get(model_type) for table in tables]
    return [name for found in names if found for name in ((found,) if isinstance(found, str) else found)]


def config_object(config: Mapping[str, Any], where: str) -> Any:
    """The transformers config object for the contents of a config.json; None for a model type it does not know.

    Raises:
        ModelError: transformers knows the type and refuses the values, or would build modules for ever.
    """
    from transformers import CONFIG_MAPPING

    _refuse_endless(config, where)

    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        return None
    plain = {key: _floats(value) for key, value in config.items() if key != "quantization_config"}
    try:
        return CONFIG_MAPPING[kind].from_dict(plain)
    except Exception as error:  # whatever checks a family makes of its own
        reason = " ".join(str(error).split()) or repr(error)
        raise ModelError(f"transformers refuses the config: {reason}", where=where) from error


def _floats(value: Any) -> Any:
    """Floats that JSON does not have, which transformers 5 writes as {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        number = _NOT_IN_JSON.get(str(value.get("__float__"))) if len(value) == 1 else None
        return {key: _floats(inner) for key, inner in value.items()} if number is None else number
    return [_floats(inner) for inner in value] if isinstance(value, list) else value


def _refuse_endless(config: Mapping[str, Any], where: str) -> None:
    """Layers and experts are built one by one, however little of them there is in the file."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _refuse_endless(value, where)
        elif isinstance(value, int) and value > _MOST_MODULES and _COUNTS.search(key):
            what = f"{value} in {key} is more than any model has"
            raise ModelError(what, where=where, hint=f"at most {_MOST_MODULES}: a damaged config")


def of_config(config: Mapping[str, Any], where: str, *, dtype: torch.dtype | None = None) -> nn.Module | None:
    """The skeleton for the contents of a config.json; None when transformers does not have the class."""
    cls = model_class(config)
    found = config_object(config, where) if cls is not None else None
    return None if found is None else build(cls, found, dtype=dtype)


def build(cls: Any, config: Any, *, dtype: torch.dtype | None = None) -> nn.Module:
    """The skeleton of a transformers model.

    Args:
        cls: a transformers model class.
        config: its config object.
        dtype: of the parameters; default: what the config says, else float32.
    """
    wanted = dtype or config_dtype(config)
    before = torch.get_default_dtype()
    torch.set_default_dtype(wanted)
    try:
        with parameters_on_meta():
            model: nn.Module = cls._from_config(config, dtype=wanted) if hasattr(cls, "_from_config") else cls(config)
    except Exception as error:  # a constructor that divides by zero, asserts, or lacks a library
        reason = " ".join(str(error).split()) or repr(error)
        raise ModelError(f"{cls.__name__} cannot be built from this config: {reason}") from error
    finally:
        torch.set_default_dtype(before)
    retie(model)
    _compute_unsaved(model)
    return model.eval()


@torch.no_grad()
def _compute_unsaved(model: Any) -> None:
    """Values for parameters that a family never saves, because it computes them: Marian's sinusoidal positions."""
    unsaved = set(getattr(model, "_keys_to_ignore_on_save", None) or ()) - tied_names(model).keys()
    for name, parameter in list(model.named_parameters()):
        if name in unsaved and parameter.is_meta:
            path, _, attribute = name.rpartition(".")
            owner = model.get_submodule(path)
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            owner._parameters[attribute] = nn.Parameter(empty, requires_grad=False)
            model._init_weights(owner)


def may_be_absent(model: nn.Module, name: str) -> bool:
    """Whether transformers loads the model without a complaint from a checkpoint that lacks this tensor."""
    return any(re.search(p, name) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or ())


def config_dtype(config: Any) -> torch.dtype:
    """dtype that a config asks for; float32 where it says nothing."""
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


def with_dtype(config: Mapping[str, Any], dtypes: Iterable[torch.dtype]) -> dict[str, Any]:
    """The contents of a config.json with its dtype said: the first float one of `dtypes` if it says none.

    transformers guesses a missing dtype from the first float tensor of the file, and in ours that may be a scale.
    """
    said = config.get("dtype") or config.get("torch_dtype")
    found = None if said else next((d for d in dtypes if d.is_floating_point), None)
    return dict(config) if found is None else {**config, "dtype": str(found).removeprefix("torch.")}


def retie(model: nn.Module) -> None:
    """Moving to meta gave each name a parameter of its own: tie what the model ties."""
    for alias, target in tied_names(model).items():
        owner, _, name = alias.rpartition(".")
        path, _, parameter = target.rpartition(".")
        places, sources = model.get_submodule(owner)._parameters, model.get_submodule(path)._parameters
        if name in places and parameter in sources:  # packed weights are shared already
            places[name] = sources[parameter]


def untie(model: Any, alias: str) -> None:
    """Give a tied parameter of a skeleton a place of its own; `tied_names` does not have it any more."""
    model.all_tied_weights_keys.pop(alias)
    owner, _, name = alias.rpartition(".")
    module = model.get_submodule(owner)
    for kind in (module._parameters, module._buffers):
        if (tied := kind.get(name)) is not None:
            fresh = torch.empty_like(tied)
            kind[name] = nn.Parameter(fresh, requires_grad=tied.requires_grad) if kind is module._parameters else fresh


def tied_names(model: nn.Module) -> dict[str, str]:
    """Tied parameters of a transformers model: name -> the name that is stored."""
    tied = getattr(model, "all_tied_weights_keys", None)
    return {str(a): str(b) for a, b in tied.items()} if isinstance(tied, dict) else {}


def give_generation(model: Any, settings: Callable[[], Mapping[str, Any]], where: str) -> None:
    """Give a model its generation defaults; those that cannot be read or taken are left out with a warning.

    They say how text is chosen, not what the model computes: transformers goes on without them, too.

    Args:
        model: of transformers, or any other, which is left as it is.
        settings: reads the contents of generation_config.json; empty where there is none.
        where: the checkpoint, for the warning.
    """
    if not hasattr(model, "generation_config"):
        return
    from transformers import GenerationConfig

    try:
        if found := settings():
            model.generation_config = GenerationConfig.from_dict(dict(found))
    except (CheckpointError, AttributeError, TypeError, ValueError) as error:
        what = "its generation_config.json cannot be used, so text is chosen by transformers' defaults"
        warnings.warn(f"{where}: {what}: {error}", stacklevel=2)
