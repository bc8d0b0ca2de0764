"""Where the output of a layer is added, as it is, to what other layers have made.

What the stream behind such a layer has lost so far, the layer itself can make up for in part; see `Statistics.deficit`.
Places are found by trying, so no family of models has to be known: a layer's output is moved a little on a few tokens
of one window, and where something else in the block moves by just as much, there is the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

_FEW = 8  # tokens, the last ones of a window
_CLOSE = 1e-3  # of the push: anything that scales or bends it is further away
OUTPUT = ""  # the place that is what the block hands on

Found = dict[str, torch.Tensor]  # the last tokens of what enters a module, by its name, in the order of the calls


def sums_behind(block: nn.Module, run: Callable[[], torch.Tensor], groups: Sequence[Sequence[str]]) -> list[str | None]:
    """For each group of layers that share their input: where its output is added.

    Args:
        block: with its weights in memory.
        run: runs it on one window; what it hands on.
        groups: names of the layers, by input; of stacks of experts, too, which are added nowhere as they are.

    Returns:
        The module into which the sum goes, `OUTPUT` for the output of the block, None where there is no sum or there
        are several layers.
    """
    alone = [group[0] for group in groups if len(group) == 1 and _is_layer(block, group[0])]
    if not alone:
        return [None] * len(groups)
    still, outputs = _listened(block, run, alone)
    places = {layer: _place(block, run, layer, still, outputs[layer]) for layer in alone if layer in outputs}
    return [places.get(group[0]) if len(group) == 1 else None for group in groups]


def _is_layer(block: nn.Module, name: str) -> bool:
    owner, _, last = name.rpartition(".")
    return isinstance(getattr(block.get_submodule(owner), last), nn.Module)


def _place(
    block: nn.Module, run: Callable[[], torch.Tensor], layer: str, still: Found, output: torch.Tensor
) -> str | None:
    """The last one that moves as the output of the layer does and is more than it."""
    generator = torch.Generator().manual_seed(0)
    signs = 2 * torch.randint(2, output.shape, generator=generator).to(output) - 1
    push = signs * (float(output.square().mean().sqrt()) or 1.0)

    def pushed(_module: nn.Module, _inputs: Any, answer: torch.Tensor) -> torch.Tensor:
        moved = answer.clone()
        moved.view(-1, moved.shape[-1])[-_FEW:] += push
        return moved

    handle = block.get_submodule(layer).register_forward_hook(pushed)
    try:
        moved, _ = _listened(block, run, ())
    finally:
        handle.remove()
    found = None
    for name, before in still.items():
        after = moved.get(name)
        if after is None or before.shape != push.shape or after.shape != push.shape or torch.equal(before, output):
            continue
        rounding = 4 * torch.finfo(before.dtype).eps * before.abs()
        if bool(((after - before - push).abs() <= _CLOSE * push.abs() + rounding).all()):
            found = name
    return found


def _listened(block: nn.Module, run: Callable[[], torch.Tensor], layers: Sequence[str]) -> tuple[Found, Found]:
    """What enters the modules that are called once, then what the block hands on; and the outputs of some layers."""
    entered, calls, outputs, handles = Found(), dict[str, int](), Found(), []

    def enters(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            calls[name] = calls.get(name, 0) + 1
            if inputs and isinstance(inputs[0], torch.Tensor) and inputs[0].is_floating_point():
                entered[name] = _few(inputs[0])

        return hook

    def leaves(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            outputs[name] = _few(output)

        return hook

    for name, module in block.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(enters(name)))
    handles += [block.get_submodule(name).register_forward_hook(leaves(name)) for name in layers]
    try:
        handed_on = _few(run())
    finally:
        for handle in handles:
            handle.remove()
    once = {name: x for name, x in entered.items() if calls[name] == 1}
    return {**once, OUTPUT: handed_on}, {name: x for name, x in outputs.items() if calls[name] == 1}


def _few(x: torch.Tensor) -> torch.Tensor:
    """Of the last tokens; a copy, which nothing changes in place."""
    return x.detach().reshape(-1, x.shape[-1])[-_FEW:].clone()
