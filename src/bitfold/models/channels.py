"""Where the channels of a tensor are after an operation that lets a positive factor of each of them through.

A factor on an output of a linear layer can move into the next linear layer if everything in between multiplies,
reshapes, transposes or mixes tokens only: value projections through attention, or the half of a gated unit that no
function bends. Only operations known to do so are followed; anything else is taken for a use that sees the factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Dims = tuple[int, ...]  # dimensions that make up the channels, slowest first
Args = Sequence[Any]
Kwargs = Mapping[str, Any]


def carried(name: str, args: Args, kwargs: Kwargs, x: torch.Tensor, dims: Dims, out: Any) -> Dims | None:
    """Where the channels of x are in the result; None where it is not known to carry their factors.

    Args:
        name: of the function of torch.
        args, kwargs: what it was called with, x among them once.
        x: any tensor.
        dims: its channels.
        out: the result.
    """
    rule = _RULES.get(name)
    if rule is None or not isinstance(out, torch.Tensor):
        return None
    return rule(args, kwargs, x, dims, out)


def _same(_args: Args, _kwargs: Kwargs, x: torch.Tensor, dims: Dims, out: torch.Tensor) -> Dims | None:
    return dims if out.shape == x.shape else None


def _product(args: Args, _kwargs: Kwargs, x: torch.Tensor, dims: Dims, out: torch.Tensor) -> Dims | None:
    others = [a for a in args if a is not x]
    plain = all(isinstance(a, (int, float)) or (isinstance(a, torch.Tensor) and a.shape == x.shape) for a in others)
    return dims if plain and out.shape == x.shape else None


def _regrouped(_args: Args, _kwargs: Kwargs, x: torch.Tensor, dims: Dims, out: torch.Tensor) -> Dims | None:
    """Channels are one run of dimensions; what comes before and after it keeps its size."""
    if out.shape == x.shape:
        return dims
    if list(dims) != list(range(dims[0], dims[-1] + 1)):
        return None
    before, after = math.prod(x.shape[: dims[0]]), math.prod(x.shape[dims[-1] + 1 :])
    first = next((i for i in range(out.dim() + 1) if math.prod(out.shape[:i]) == before), None)
    last = next((i for i in range(out.dim(), -1, -1) if math.prod(out.shape[i:]) == after), None)
    if first is None or last is None or first >= last:
        return None
    return tuple(range(first, last))


def _swapped(args: Args, kwargs: Kwargs, x: torch.Tensor, dims: Dims, _out: torch.Tensor) -> Dims | None:
    if len(args) != 3:
        return None
    a, b = (int(d) % x.dim() for d in args[1:])
    return tuple({a: b, b: a}.get(d, d) for d in dims)


def _joined(args: Args, kwargs: Kwargs, x: torch.Tensor, dims: Dims, out: torch.Tensor) -> Dims | None:
    """A cache that was empty."""
    alone = all(t is x or t.numel() == 0 for t in args[0])
    return dims if alone and out.shape == x.shape else None


def _mixed(args: Args, _kwargs: Kwargs, x: torch.Tensor, dims: Dims, out: torch.Tensor) -> Dims | None:
    """weights @ x mixes the second last dimension."""
    inside = x.dim() - 2 not in dims and out.dim() == x.dim() and out.shape[:-2] == x.shape[:-2]
    return dims if len(args) == 2 and args[1] is x and inside else None


def _attended(args: Args, kwargs: Kwargs, x: torch.Tensor, dims: Dims, out: torch.Tensor) -> Dims | None:
    """Only values pass, and only where each head has its own."""
    value = args[2] if len(args) > 2 else kwargs.get("value")
    inside = x.dim() - 2 not in dims and out.dim() == x.dim() and out.shape[:-2] == x.shape[:-2]
    return dims if value is x and inside else None


_RULES: dict[str, Callable[[Args, Kwargs, torch.Tensor, Dims, torch.Tensor], Dims | None]] = {
    **dict.fromkeys(("contiguous", "clone", "to", "float", "type_as", "dropout", "relu", "detach"), _same),
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "mul_", "__imul__"), _product),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten"), _regrouped),
    "transpose": _swapped,
    "cat": _joined,
    "matmul": _mixed,
    "scaled_dot_product_attention": _attended,
}
