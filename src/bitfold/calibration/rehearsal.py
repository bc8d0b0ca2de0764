"""The model run once before the work, on a few tokens and with next to no memory, to see how it runs.

Every parameter is one number seen as a whole tensor, and products with weights are left out; everything else really
happens, routing of tokens and control flow included. Who made each tensor is noted, so that afterwards it is known
which lists of modules are a chain, where each module takes the activations and where it hands them on, and what else
passes from one to another.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from bitfold.models.eager_experts import one_expert_at_a_time
from bitfold.nn import set_tensor

_TOKENS = 8
_VALUE = 0.02  # of every parameter
_LARGE = 1 << 12  # weights from which on a product is left out
_PRODUCTS = (torch.bmm, torch.Tensor.bmm, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
_GLUE = "something between its blocks changes what they hand on"


def text_inputs(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """What a model of transformers is called with to run on token ids (batch, tokens)."""
    given: dict[str, Any] = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = ids
    known = inspect.signature(model.forward).parameters
    if "use_cache" in known or any(p.kind is p.VAR_KEYWORD for p in known.values()):
        given["use_cache"] = False
    return given


def takes_text(model: nn.Module) -> bool:
    """Whether a model is called with token ids and nothing else that is indispensable."""
    main = getattr(model, "main_input_name", "input_ids")
    return main == "input_ids" and "input_ids" in inspect.signature(model.forward).parameters


@dataclass
class Seen:
    """One module of a list, as it was called.

    Args:
        path: of the module.
        hidden: place of the activations among its arguments, a position or a name; None = not found.
        arguments: what it was called with, by place.
        answer: what it returned.
        at: place of the activations in a tuple that it returned; None = it returned them alone.
        groups: layers in it by the input that they shared, in the order of their execution.
    """

    path: str
    hidden: int | str | None
    arguments: Mapping[int | str, Any]
    answer: Any = None
    at: int | None = None
    groups: list[list[str]] = field(default_factory=list)


@dataclass
class Chain:
    """A list of modules that were called; `obstacle`: why they cannot be called one after the other, in words."""

    path: str
    seen: list[Seen] = field(default_factory=list)
    obstacle: str | None = None


class Rehearsal:
    """One run of a model.

    Args:
        model: on the meta device; it is not changed.
        layers: paths of the linear layers whose inputs matter.

    Attributes:
        chains: the outermost lists of modules of which any was called.
        failure: what the run ended with; None = it went through.
        outside: groups of layers in none of the lists.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self.model = stand_in(model)
        self.failure: Exception | None = None
        self.outside: list[list[str]] = []
        self.chains: list[Chain] = []
        self._watch = _Watch()
        self._alive: list[torch.Tensor] = []
        self._groups: dict[int, list[str]] = {}
        handles = [self.model.get_submodule(path).register_forward_pre_hook(self._layer(path)) for path in layers]
        for path, modules in outermost_lists(self.model):
            handles += self._listen(path, modules)
        self._run()
        for handle in handles:
            handle.remove()
        self.chains = [chain for chain in self.chains if chain.seen]
        self._alive.clear()

    def _run(self) -> None:
        ids = torch.arange(1, 1 + _TOKENS)[None] % vocabulary(self.model)
        try:
            with torch.no_grad(), _Shortened(), self._watch:
                self.model(**text_inputs(self.model, ids))
        except Exception as error:  # whatever the model's own code comes up with: it is what the caller asks about
            self.failure = error

    def _listen(self, path: str, modules: nn.ModuleList) -> list[Any]:
        chain, handles = Chain(path), []
        self.chains.append(chain)
        for number, module in enumerate(modules):
            name = f"{path}.{number}"
            handles.append(module.register_forward_pre_hook(partial_hook(self._enter, chain, name), with_kwargs=True))
            handles.append(module.register_forward_hook(partial_hook(self._leave, chain)))
        return handles

    def _enter(self, chain: Chain, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch = self._watch
        if watch.inside is not None or any(seen.path == name for seen in chain.seen):
            chain.obstacle = chain.obstacle or "its blocks are called more than once, or by one another"
            return
        places = dict[int | str, Any]([*enumerate(args), *kwargs.items()])
        seen = Seen(name, None, places)
        if chain.seen:
            seen.hidden = self._handed_on(chain.seen[-1], places)
            if seen.hidden is None:
                chain.obstacle = chain.obstacle or _GLUE
        chain.seen.append(seen)
        watch.enter(chain.path, name, None if seen.hidden is None else places[seen.hidden])
        self._groups = {}

    def _handed_on(self, before: Seen, places: Mapping[int | str, Any]) -> int | str | None:
        """Where an argument is what the block before has returned."""
        for place, value in places.items():
            for at, made in elements(before.answer):
                if value is made and isinstance(value, torch.Tensor) and self._watch.unchanged(value):
                    before.at = at
                    return place
        return None

    def _leave(self, chain: Chain, _args: tuple[Any, ...], answer: Any) -> None:
        if not chain.seen or self._watch.inside != chain.seen[-1].path:
            return
        last = chain.seen[-1]
        last.answer, last.groups = answer, list(self._groups.values())
        if (leaked := self._watch.leave()) is not None:
            chain.obstacle = chain.obstacle or f"{last.path} uses what {leaked} has made besides its output"

    def _layer(self, path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if not inputs or not isinstance(inputs[0], torch.Tensor):
                return
            self._alive.append(inputs[0])
            if self._watch.inside is not None:
                self._groups.setdefault(inputs[0].data_ptr(), []).append(path)
            else:
                self.outside.append([path])

        return hook


def partial_hook(work: Callable[..., None], *given: Any) -> Callable[..., None]:
    """A hook that passes on what was given, and all it is called with but the module."""
    return lambda _module, *rest: work(*given, *rest)


def elements(answer: Any) -> list[tuple[int | None, Any]]:
    """A tensor alone, or the members of a tuple, by place."""
    return list(enumerate(answer)) if isinstance(answer, (tuple, list)) else [(None, answer)]


def outermost_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Lists of modules that are in no other such list."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(path.startswith(p) for p in inside):
            inside.append(f"{path}.")
            yield path, module


def vocabulary(model: Any) -> int:
    """Tokens that a model knows."""
    embedding = model.get_input_embeddings()
    return int(embedding.weight.shape[0]) if isinstance(embedding, nn.Embedding) else 2


def stand_in(model: nn.Module) -> nn.Module:
    """A copy in which every parameter, and every buffer that is not known, is one number seen as a whole tensor."""
    made = copy.deepcopy(model)
    one_expert_at_a_time(made)
    for name, old in [*made.named_parameters(remove_duplicate=False), *made.named_buffers(remove_duplicate=False)]:
        if old.is_meta:
            dtype = torch.float32 if old.is_floating_point() else old.dtype
            value = torch.full((1,), _VALUE, dtype=torch.float32).to(dtype)
            set_tensor(made, name, value.expand(old.shape) if old.dim() else value.reshape(()))
    return made.eval()


def _is_stand_in(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.numel() > 1 and not any(tensor.stride())


class _Shortened(TorchFunctionMode):
    """Leaves out products with weights that stand in for others: the shape of the result is all that matters."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if len(args) > 1 and _is_stand_in(args[1]) and args[1].numel() >= _LARGE:
            if func is F.linear and args[1].dim() == 2:
                return _widened(args[0], args[1].shape[0])
            if func in _PRODUCTS and args[1].dim() <= args[0].dim():
                return _widened(args[0], args[1].shape[-1])
        return func(*args, **(kwargs or {}))


def _widened(x: torch.Tensor, width: int) -> torch.Tensor:
    return x[..., :1].expand(*x.shape[:-1], width).clone()


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which block made each tensor, and whether another one uses it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside: str | None = None
        self._chain = ""
        self._made: Any = WeakTensorKeyDictionary()  # tensor -> for each list, the block of it that made the tensor
        self._changed: Any = WeakTensorKeyDictionary()
        self._hidden: torch.Tensor | None = None
        self._leaked: str | None = None

    def enter(self, chain: str, block: str, hidden: torch.Tensor | None) -> None:
        """From now on the work is that of a block, which may use `hidden` of what others of its list made."""
        self._chain, self.inside, self._hidden, self._leaked = chain, block, hidden, None

    def leave(self) -> str | None:
        """The block is through; which other one it used something of, if it did."""
        self.inside, self._hidden = None, None
        return self._leaked

    def unchanged(self, tensor: torch.Tensor) -> bool:
        """Whether nothing between blocks wrote into a tensor."""
        return tensor not in self._changed

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        writes = func._schema.is_mutable
        if writes and given and _is_stand_in(given[0]):
            return given[0]  # a weight that is rescaled in place
        out = func(*args, **kwargs)
        makers = [self._made.get(t) or {} for t in given]
        labels: dict[str, str] = {chain: block for maker in makers for chain, block in maker.items()}
        if self.inside is not None:
            others = (m.get(self._chain) for t, m in zip(given, makers, strict=True) if t is not self._hidden)
            self._leaked = self._leaked or next((m for m in others if m not in (None, self.inside)), None)
            labels[self._chain] = self.inside
        elif writes and given and makers[0]:
            self._changed[given[0]] = True
        if labels:
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self._made[tensor] = labels
        return out
