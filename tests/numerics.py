"""What may be asked of numbers that PyTorch or a BLAS has added up: to be close to the exact ones, never to be equal.

The order of their sums changes with the CPU, the version of the library, the number of threads, the rows of a batch and
the layout of memory, so that equal bits here are no promise about another machine. Equal bits are asked of what is
bitfold's own: codes, decoded weights, files of a run without calibration, the loops of the native core. And of a
computation that is repeated as it was: same process or same machine, same threads, same shapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

EPS = 2.0**-24  # half a unit in the last place of a float32
SUMS = 2**11  # in EPS: hundreds of products in each sum of a small network, some ten layers one after the other
HALVES = 32  # the same where numbers are rounded to 16 bits between layers, in units of theirs


def product_bound(x: Tensor, w: Tensor) -> Tensor:
    """How far x W^T in float32 may be from the exact product, whatever the order of its sums: float64 (m, n).

    A sum of k products is off by at most k roundings of a partial sum, each at most EPS of sum |x| |w|; 8 more pay for
    scales that are multiplied in before or after.
    """
    return (x.shape[1] + 8) * EPS * (x.double().abs() @ w.double().abs().T)


def check_product(y: Tensor, x: Tensor, w: Tensor) -> None:
    """Whether y (m, n) is x (m, k) W^T for w (n, k), against float64."""
    wrong = (y.double() - x.double() @ w.double().T).abs() - product_bound(x, w)
    assert y.shape == wrong.shape
    assert bool((wrong <= 0).all()), f"off by {float(wrong.max()):g} more than rounding explains"


def check_same_answers(found: Tensor, expected: Tensor) -> None:
    """Whether two passes through one small network are the same but for the order of sums.

    A code that is one step off moves an answer by a hundred times as much. Compare the weights as well, bit for bit.
    """
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    relative = SUMS * EPS if found.dtype == torch.float32 else HALVES * torch.finfo(found.dtype).eps / 2
    off = float((found.double() - expected.double()).abs().max()) if found.numel() else 0.0
    assert off <= relative * float(expected.double().abs().max()), off


def check_all_same_answers(found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """`check_same_answers`, one by one."""
    for one, other in zip(found, expected, strict=True):
        check_same_answers(one, other)


def check_same_tensors(one: nn.Module, other: nn.Module) -> None:
    """Whether two models hold the same parameters and buffers, bit for bit: packed codes, scales and what was kept."""
    tensors = [
        dict(itertools.chain(m.named_parameters(remove_duplicate=False), m.named_buffers(remove_duplicate=False)))
        for m in (one, other)
    ]
    assert tensors[0].keys() == tensors[1].keys(), tensors[0].keys() ^ tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert tensor.dtype == tensors[1][name].dtype, name
        assert torch.equal(raw(tensor), raw(tensors[1][name])), name


def raw(tensor: Tensor) -> Tensor:
    """Its bytes, so that NaN equals NaN."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def check_same_codes(found: Tensor, expected: Tensor, share: float = 0.99) -> None:
    """Whether codes that come out of sums of PyTorch's (error feedback, Hessians) are the same, up to rare ties.

    A sum in another order may tip a weight that lies between two codes, and those after it in its row.
    """
    assert found.shape == expected.shape
    same = float((found == expected).float().mean())
    assert same >= share, same
