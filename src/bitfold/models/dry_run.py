"""A model run before it is there: weights on the meta device, activations in memory.

On the meta device alone, whatever depends on values cannot be run: experts that tokens are sent to, lengths, masks. So
only the weights have no values here. What an operation makes of activations and weights has the shape and dtype that it
would have, and values drawn at random; what it makes of activations alone is computed. Nothing of a model's size is
touched, and code of any family runs as it would.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bitfold.models.eager_experts import eager_experts
from bitfold.nn import QWeight

Watcher = Callable[[Any, Sequence[Any], Mapping[str, Any], Any], None]
_TOKENS = 4
_ALIKE = ("to", "type_as", "view_as", "expand_as", "reshape_as")


class DryRun(TorchFunctionMode):
    """Within this mode, tensors on the meta device are weights, and everything else is activations.

    Args:
        watch: told of every operation on a weight: function, arguments, result.
    """

    def __init__(self, watch: Watcher | None = None) -> None:
        super().__init__()
        self._watch = watch
        self._generator = torch.Generator().manual_seed(0)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return torch.device("cpu")  # where activations are to be made
        found = list(_tensors((args, list(kwargs.values()))))
        if not any(map(_is_weight, found)):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _ALIKE and len(args) == 2 and not _is_weight(args[0]):
            return args[0].to(args[1].dtype) if name in ("to", "type_as") else func(args[0], _filled(args[1], None))
        if name == "to" and _is_weight(args[0]):  # wherever it is to be, it stays without values
            args = [args[0], *(a for a in args[1:] if not isinstance(a, (str, torch.device)))]
            kwargs.pop("device", None)
            if len(args) == 1 and not kwargs:
                return args[0]
        out = func(*_to_meta(args), **_to_meta(kwargs))
        if self._watch is not None:
            self._watch(func, args, kwargs, out)
        if name.endswith("_") and not name.endswith("__") and not _is_weight(args[0]):
            return args[0]
        part = name in ("__getitem__", "index_select") and _is_weight(args[0])
        if part or not (name.startswith("new_") or any(not _is_weight(t) for t in found)):
            return out  # still a weight
        return _filled(out, self._generator)


def _is_weight(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, QWeight)) and value.is_meta


def _tensors(values: Any) -> Iterator[Any]:
    if isinstance(values, (torch.Tensor, QWeight)):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def _to_meta(value: Any) -> Any:
    """Activations as shapes; numbers of rows, which an index needs to know, as numbers."""
    if isinstance(value, torch.Tensor):
        number = value.dim() == 0 and not value.is_floating_point() and not value.is_meta
        return value.item() if number else value.to("meta")
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields") and not isinstance(value, torch.Size):
        return type(value)(_to_meta(v) for v in value)
    return {k: _to_meta(v) for k, v in value.items()} if isinstance(value, dict) else value


def _filled(value: Any, generator: torch.Generator | None) -> Any:
    """The same with values: any between 0 and 1."""
    if isinstance(value, torch.Tensor):
        if not value.is_meta:
            return value
        if not value.is_floating_point():
            return torch.zeros(value.shape, dtype=value.dtype)
        return torch.rand(value.shape, generator=generator).to(value.dtype)
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(_filled(v, generator) for v in value)
    return value


def run_dry(model: Any, watch: Watcher | None = None, *, begin: Callable[[nn.Module], None] | None = None) -> Any:
    """What a copy of a transformers model answers to a few tokens, its weights on the meta device: shapes, no values.

    Args:
        model: any transformers model; it is left as it is.
        watch: told of every operation on a weight.
        begin: given the copy before it is run.

    Raises:
        LookupError: it does not begin with tokens.
        Exception: whatever its code raises.
    """
    if getattr(model, "main_input_name", None) != "input_ids":
        raise LookupError("its inputs are not tokens")
    model = _without_values(model)
    if begin is not None:
        begin(model)
    ids = torch.arange(_TOKENS)[None]
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    with torch.no_grad(), DryRun(watch), eager_experts(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(**inputs)


def _without_values(model: nn.Module) -> nn.Module:
    """A copy on the meta device, but for its buffers; no parameter is copied."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    trial = copy.deepcopy(model, memo).eval()
    for weight in (m for m in trial.modules() if isinstance(m, QWeight)):
        weight.to_empty(device="meta")
    return trial
