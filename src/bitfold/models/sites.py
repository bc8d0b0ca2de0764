"""Find what can be quantized: linear layers, GPT-2's Conv1D, embeddings, fused expert stacks.

Any `nn.Module` will do; nothing asks for a model family. What is kept by default (output heads, routers, embeddings,
tied weights) is found as well, with the reason, because a rule may name it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from bitfold.models.stacks import Stack, find_stacks
from bitfold.system.tensorinfo import TensorInfo

LINEAR, EMBEDDING, EXPERTS = "linear", "embedding", "experts"
OUTPUT_HEAD = "output head"  # why a linear layer is kept
_ROUTER = re.compile(r"(^|\.)((\w+_)?router|gate|shared_expert_gate|wg|gate_network)(\.\w+)?$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection|proj_out|decoder\.output|cls\.predictions\.decoder)$")
_EMBEDDING_NAME = re.compile(
    r"(^|\.)(\w*embed\w*|wte|wpe|word_embeddings|position_embeddings|token_type_embeddings|shared|\w*relative_attention_bias)$"
)
# What PEFT wraps: its layers, copies that are trained, whole models.
_WRAPPED = ("base_layer", "original_module", "base_model", "model", "lora_model", "word_embeddings")
_WRAPPER = re.compile(r"(\.(base_layer|original_module))+$")
_CONV1D_NAME = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$")


@dataclass(frozen=True)
class Site:
    """One weight that can be quantized.

    Args:
        tensor: its name in the state dict, e.g. model.layers.0.mlp.up_proj.weight.
        kind: "linear", "embedding" or "experts".
        shape: as the model has it.
        keep: why it is kept unless a rule names it; None if it is quantized by default.
        transposed: the model stores (..., k, n) instead of (..., n, k).
        aliases: other names of the same parameter (tied weights).
        experts: how many weights lie one upon the other in the rows of a matrix (experts * n, k), which is quantized
            as the stack (experts, n, k) that the model views it as; None for all others.
    """

    tensor: str
    kind: str
    shape: tuple[int, ...]
    keep: str | None = None
    transposed: bool = False
    aliases: tuple[str, ...] = ()
    experts: int | None = None

    @property
    def is_table(self) -> bool:
        """Whether it has a row for each word, or position: an embedding, or an output head."""
        return self.kind == EMBEDDING or self.keep == OUTPUT_HEAD

    @property
    def module(self) -> str:
        """Path of the module that owns the tensor."""
        return self.tensor.rpartition(".")[0]

    @property
    def parameter(self) -> str:
        """Attribute under which the module holds it."""
        return self.tensor.rpartition(".")[2]

    @property
    def qshape(self) -> tuple[int, ...]:
        """Shape as it is quantized: inputs last."""
        *lead, a, b = self.shape
        if self.experts is not None:
            lead, a = [self.experts], a // self.experts
        return (*lead, b, a) if self.transposed else (*lead, a, b)

    def oriented(self, w: torch.Tensor) -> torch.Tensor:
        """The model's tensor as it is quantized: of `qshape`, a view."""
        w = w if self.experts is None else w.reshape(self.experts, -1, w.shape[-1])
        return w.mT if self.transposed else w

    def restored(self, w: torch.Tensor) -> torch.Tensor:
        """What was quantized, as the model has it: of `shape`."""
        w = w.mT if self.transposed else w
        return w if self.experts is None else w.flatten(0, 1)


def find_sites(model: nn.Module) -> list[Site]:
    """All sites of a module, in the order of its modules; tied weights once, with their aliases."""
    heads, stacks, adapters = _output_heads(model), find_stacks(model), _adapters(model)
    owners: dict[int, int] = {}
    sites: list[Site] = []
    for path, module in model.named_modules(remove_duplicate=False):  # a module used twice has two names as well
        for site in _sites_of(path, module, heads, stacks) if not f"{path}.".startswith(adapters) else ():
            parameter = getattr(module, site.parameter)
            if id(parameter) in owners:
                at = owners[id(parameter)]
                sites[at] = _tie(sites[at], site)
                continue
            owners[id(parameter)] = len(sites)
            sites.append(site)
    return sites


def _adapters(model: nn.Module) -> tuple[str, ...]:
    """Paths, with a dot, of what PEFT put beside the layers of a model: it is trained, and stays in floating point.

    In any of PEFT's modules, whatever the method, all children are its own but for what it wraps.
    """
    return tuple(
        f"{path}.{name}." if path else f"{name}."
        for path, module in model.named_modules(remove_duplicate=False)
        if any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)
        for name, _ in module.named_children()
        if name not in _WRAPPED
    )


def _tie(first: Site, other: Site) -> Site:
    keep = first.keep or other.keep
    return replace(first, keep=keep, aliases=(*first.aliases, other.tensor))


def _sites_of(path: str, module: nn.Module, heads: set[int], stacks: Mapping[str, Stack]) -> list[Site]:
    prefix = f"{path}." if path else ""
    weight, path = module._parameters.get("weight"), _WRAPPER.sub("", path)
    if isinstance(module, nn.Linear) and weight is not None:
        keep = OUTPUT_HEAD if id(module) in heads or _HEAD.search(path) else _router(path)
        return [Site(prefix + "weight", LINEAR, tuple(weight.shape), keep)]
    if isinstance(module, nn.Embedding) and weight is not None:
        return [Site(prefix + "weight", EMBEDDING, tuple(weight.shape), "embedding")]
    # transformers' Conv1D, by its look, so that transformers need not be imported for other models
    if type(module).__name__ == "Conv1D" and weight is not None and weight.dim() == 2 and hasattr(module, "nf"):
        return [Site(prefix + "weight", LINEAR, tuple(weight.shape), None, transposed=True)]
    return _experts_of(prefix, module, stacks)


def _experts_of(prefix: str, module: nn.Module, stacks: Mapping[str, Stack]) -> list[Site]:
    """Stacks of experts, used as the run of the model has shown; an attribute of some families says it otherwise."""
    said = hasattr(module, "is_transposed") or type(module).__name__.endswith("Experts")
    usual = Stack(bool(getattr(module, "is_transposed", False)))
    sites = []
    for name, p in module._parameters.items():
        used = stacks.get(prefix + name, usual)
        if p is not None and (used.experts is not None or (said and p.dim() == 3)):
            shape = tuple(p.shape)
            sites.append(Site(prefix + name, EXPERTS, shape, None, used.inputs_second, experts=used.experts))
    return sites


def _router(path: str) -> str | None:
    return "router" if _ROUTER.search(path) else None


def _output_heads(model: nn.Module) -> set[int]:
    getter = getattr(model, "get_output_embeddings", None)
    try:
        head = getter() if callable(getter) else None
    except (AttributeError, NotImplementedError):
        head = None
    return set() if head is None else {id(head)}


def guess_sites(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> list[Site]:
    """Sites of a checkpoint whose model class is unknown, by the names and shapes of its tensors."""
    conv1d = config.get("model_type") in ("gpt2", "openai-gpt", "imagegpt")
    sites = []
    for name, info in tensors.items():
        module, _, leaf = name.rpartition(".")
        if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
            continue
        if len(info.shape) == 3 and "expert" in name and leaf != "bias":
            sites.append(Site(name, EXPERTS, info.shape))
        elif len(info.shape) == 2 and leaf == "weight":
            sites.append(_guess(name, module, info.shape, conv1d))
    return sites


def _guess(name: str, module: str, shape: tuple[int, ...], conv1d: bool) -> Site:
    if _EMBEDDING_NAME.search(module):
        return Site(name, EMBEDDING, shape, "embedding")
    keep = OUTPUT_HEAD if _HEAD.search(module) else _router(module)
    return Site(name, LINEAR, shape, keep, transposed=conv1d and bool(_CONV1D_NAME.search(module)))
