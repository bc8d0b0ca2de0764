"""Norms and linear layers that can take over the factors of input channels of the layers behind them.

A norm ends in a product with its weight, channel by channel, so factors can move into that weight and cost nothing at
run time; so they can into the rows of a linear layer whose outputs reach the next one merely multiplied, reshaped or
mixed over tokens (see channels.py). But only if nothing but those layers sees the output. Both are found out, not
looked up by model family: the model is run on the meta device, where nothing is computed, and every use of an output
is noted; and a norm is believed to scale with its weight when a copy of it with random weights does.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from bitfold.models.channels import Dims, carried

_METADATA = {"__get__", "size", "dim", "ndimension", "numel", "is_contiguous"}
_OTHER = ""  # a use that is no linear layer


def find_folds(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Norms and linear layers of a model by path, each with the paths of the linear layers that alone use its output.

    Args:
        model: a transformers model whose parameters are on the meta device.

    Returns:
        What can be told; nothing for a model that does not run on the meta device.
    """
    model = copy.deepcopy(model).to("meta")
    for module in model.modules():
        if any(p is not None and p.dim() == 3 for p in module._parameters.values()):
            # A stack of experts sends tokens by numbers that are not there; its output looks like its input.
            module.__dict__["forward"] = lambda x, *_args, **_kwargs: torch.empty_like(x)
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    uses = _Uses({id(m.weight): path for path, m in linears.items()})
    handles = [m.register_forward_hook(uses.note(path)) for path, m in model.named_modules() if _may_fold(m)]
    handles += [m.register_forward_hook(uses.note(path)) for path, m in linears.items()]
    try:
        with torch.no_grad(), uses:
            any_model: Any = model
            any_model(input_ids=torch.zeros(1, 4, dtype=torch.int64, device="meta"), use_cache=True)
    except Exception:
        return {}
    finally:
        for handle in handles:
            handle.remove()
    # A layer that hears two of them (or one twice) cannot give its factors to one.
    once = {layer for layer, count in _counted(uses.found.values()).items() if count == 1}
    return {
        source: tuple(layers)
        for source, layers in uses.found.items()
        if layers and all(layer in once for layer in layers) and uses.calls[source] == 1
    }


def _counted(groups: Any) -> dict[str, int]:
    counts: dict[str, int] = {_OTHER: 2}
    for layer in (layer for group in groups for layer in group):
        counts[layer] = counts.get(layer, 0) + 1
    return counts


class _Uses(TorchFunctionMode):
    """Notes who uses the outputs of norms and linear layers, and of what merely carries their channels on."""

    def __init__(self, layers: Mapping[int, str]) -> None:
        super().__init__()
        self._layers = layers
        self._channels: dict[int, list[tuple[str, Dims]]] = {}  # by tensor: whose outputs it carries, and where
        self._alive: list[torch.Tensor] = []  # so that no two outputs get the same id
        self.found: dict[str, list[str]] = {}
        self.calls: dict[str, int] = {}

    def note(self, path: str) -> Any:
        """A forward hook for the norm or layer of that path."""

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self.calls[path] = self.calls.get(path, 0) + 1
            self.found.setdefault(path, [])
            if isinstance(output, torch.Tensor):
                self._carry(output, path, (output.dim() - 1,))
            else:
                self.found[path].append(_OTHER)

        return hook

    def _carry(self, tensor: torch.Tensor, path: str, dims: Dims) -> None:
        self._alive.append(tensor)
        carries = self._channels.setdefault(id(tensor), [])
        if (path, dims) not in carries:  # an operation may return what it was given
            carries.append((path, dims))

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _METADATA and not isinstance(out, torch.Tensor):  # x.shape, but not x.mT
            return out
        tensors = list(_tensors((args, list(kwargs.values()))))
        for tensor in {id(t): t for t in tensors}.values():
            alone = sum(t is tensor for t in tensors) == 1
            for path, dims in list(self._channels.get(id(tensor), [])):
                if func is F.linear and tensor is args[0] and len(args) > 1 and dims == (tensor.dim() - 1,):
                    self.found[path].append(self._layers.get(id(args[1]), _OTHER))
                elif alone and (after := carried(name, args, kwargs, tensor, dims, out)) is not None:
                    self._carry(out, path, after)
                else:
                    self.found[path].append(_OTHER)
        return out


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


def _may_fold(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1 and not list(module.children())


def folded_norm(norm: nn.Module, scale: torch.Tensor) -> tuple[dict[str, torch.Tensor], float] | None:
    """The parameters of a norm whose output is `scale` times what it was; None if it does not scale with its weight.

    Args:
        norm: with its parameters in memory.
        scale: (k,) factors of the output channels.

    Returns:
        The parameters, float32, and what the norm adds to its weight before it multiplies: 0, or 1 as Gemma's do.
    """
    for added in (0.0, 1.0):
        changed = {name: p.detach() * scale + (scale - 1) * added * (name == "weight") for name, p in _own(norm)}
        if _does(norm, changed, scale):
            return changed, added
    return None


def _own(norm: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, p.detach().float()) for name, p in norm._parameters.items() if p is not None]


@torch.no_grad()
def _does(norm: nn.Module, changed: Mapping[str, torch.Tensor], scale: torch.Tensor) -> bool:
    x = torch.randn(3, len(scale), generator=torch.Generator().manual_seed(0))
    before, after = copy.deepcopy(norm).float(), copy.deepcopy(norm).float()
    for name, value in changed.items():
        after._parameters[name] = nn.Parameter(value.float(), requires_grad=False)
    with contextlib.suppress(RuntimeError):
        expected, found = before(x) * scale, after(x)
        return bool(torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())))
    return False


def scales_with_weight(norm: nn.Module) -> bool:
    """Whether a norm on the meta device would take factors, tried on random parameters."""
    trial = copy.deepcopy(norm).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(1)
    for name, p in list(trial._parameters.items()):
        if p is not None:
            value = torch.rand(p.shape, generator=generator) + 0.5
            trial._parameters[name] = nn.Parameter(value, requires_grad=False)
    assert isinstance(trial.weight, torch.Tensor)
    return folded_norm(trial, torch.rand(trial.weight.shape, generator=generator) + 0.5) is not None
