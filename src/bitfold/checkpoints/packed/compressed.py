"""compressed-tensors, as llm-compressor, AutoRound and others write it: a format for each group of modules.

    pack-quantized        weight_packed int32 (n, words): codes + 2**(bits - 1) along a row, lowest bits first;
                          weight_shape; weight_zero_point int32 (words, groups), packed down the columns in the same
                          way; weight_g_idx (k,)
    int-quantized, naive-quantized, float-quantized
                          weight int8 or float8 (n, k); weight_zero_point int8
    nvfp4-pack-quantized  weight_packed uint8 (n, k / 2), weight_scale E4M3 (n, k / 16), divided by
                          weight_global_scale (1,)
    mxfp4-pack-quantized  weight_packed uint8 (n, k / 2), weight_scale uint8 (n, k / 32): 2**(code - 127)

weight_scale is (1,), (n, 1), (n, groups) or has an entry for each block. Scales of activations are beside the point:
the weights are read, products with them are those of floats. Source: compressed-tensors 0.20, `compressors/`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bitfold.checkpoints.packed.base import FLOATS, Packed, Parts, Stored
from bitfold.checkpoints.packed.fields import along_rows, by_columns, floats4, floats8, integers, mxfp4, nvfp4
from bitfold.errors import CheckpointError
from bitfold.formats.grids import E4M3
from bitfold.qtensor import QTensor

Decode = Callable[[Parts], QTensor | Tensor]
Names = dict[str, str]
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_BYTES = (torch.uint8,)


def read_compressed(stored: Stored) -> dict[str, Packed]:
    """The weights of all groups of modules."""
    said = stored.settings
    for key in ("sparsity_config", "transform_config"):
        if said.get(key):
            stored.refuse(f"with a {key}")
    if said.get("quantization_status", "compressed") not in ("compressed", "frozen"):
        stored.refuse(f"in the state {str(said['quantization_status'])[:40]!r} (compressed is read)")
    groups = said.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(g, dict) for g in groups.values()):
        stored.refuse("without config_groups")
    found = {}
    for module, field in _modules(stored):
        group = _group_of(stored, list(groups.values()), module)
        kind = str(group.get("format") or said.get("format"))
        if kind not in _KINDS:
            stored.refuse(f"format {kind[:40]!r} ({', '.join(_KINDS)} are read)")
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise stored.damaged(f"{module}.{field}", "belongs to a group without weights")
        found[f"{module}.weight"] = _KINDS[kind](stored, module, weights)
    return found


def _modules(stored: Stored) -> Iterator[tuple[str, str]]:
    """Modules whose weights are packed, and the tensor that shows it."""
    yield from ((module, "weight_packed") for module in stored.ending(".weight_packed"))
    for module in stored.ending(".weight_scale"):
        if stored.has(f"{module}.weight"):
            yield module, "weight"


def _group_of(stored: Stored, groups: list[dict[str, Any]], module: str) -> dict[str, Any]:
    """The group of a module: one that names it, or matches it, before those that name a class."""
    if len(groups) == 1:
        return groups[0]
    for named in (True, False):
        for group in groups:
            if any(
                _names(str(target), module) if named else "." not in str(target) for target in group.get("targets", ())
            ):
                return group
    stored.refuse(f"with no group for {module}")


def _names(target: str, module: str) -> bool:
    if not target.startswith("re:"):
        return target == module
    try:
        return re.match(target[3:], module) is not None
    except re.error as error:
        raise CheckpointError(f"the target {target[:60]!r} is no pattern: {error}", where=module) from error


def _whole(weights: Mapping[str, Any], key: str, stored: Stored) -> int:
    value = weights.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"the {key} of its {stored.program} config is {str(value)[:40]}", where=stored.where)
    return value


def _scale(stored: Stored, name: str, shape: tuple[int, int], weights: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of the blocks that share a scale; CheckpointError where the scales are not one for each."""
    n, k = shape
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    info = stored.infos.get(name)
    if info is None:
        raise stored.damaged(name, "is missing")
    if strategy == "tensor":
        stored.expect(name, FLOATS, (1,) * len(info.shape) if len(info.shape) < 3 else (1,))
        return n, k
    if strategy == "channel":
        stored.expect(name, FLOATS, (n, 1))
        return 1, k
    if strategy == "block":
        found = weights.get("block_structure")
        if not isinstance(found, list) or len(found) != 2 or any(type(b) is not int or b < 1 for b in found):
            stored.refuse(f"blocks of {str(found)[:40]}")
        block = found[0], found[1]
    elif strategy == "group":
        block = 1, _whole(weights, "group_size", stored)
    else:
        stored.refuse(f"strategy {str(strategy)[:40]!r}")
    stored.expect(name, FLOATS, (-(-n // block[0]), -(-k // block[1])))
    return block


def _by_row(scale: Tensor, n: int, rows: int) -> Tensor:
    """Scales or zero points (n or 1, groups) of rows, from those of blocks of rows."""
    whole = scale.reshape(1, 1) if scale.numel() == 1 else scale
    return whole if rows in (1, n) else whole.repeat_interleave(rows, 0)[:n]


def _packed(stored: Stored, module: str, weights: Mapping[str, Any]) -> Packed:
    names = {part: f"{module}.{part}" for part in ("weight_packed", "weight_scale", "weight_shape")}
    bits, symmetric = _whole(weights, "num_bits", stored), weights.get("symmetric", True) is True
    if bits > 8 or weights.get("type", "int") != "int":
        stored.refuse(f"{bits} bits of {str(weights.get('type'))[:40]} (integers up to 8 are read)")
    stored.expect(names["weight_shape"], (torch.int64, torch.int32), (2,))
    n, k = (int(size) for size in stored.read(names["weight_shape"]))
    if n < 1 or k < 1:
        raise stored.damaged(names["weight_shape"], f"says ({n}, {k})")
    _, words = stored.expect(names["weight_packed"], (torch.int32,), (n, None))
    dense, padded = -(-k * bits // 32), -(-k // (32 // bits))
    if words == padded != dense:
        stored.refuse(f"{bits} bits with unused ones in every word, as older versions have it (dense ones are read)")
    if words != dense:
        raise stored.damaged(
            names["weight_packed"], f"has rows of {words} words, {k} codes of {bits} bits fill {dense}"
        )
    block = _scale(stored, names["weight_scale"], (n, k), weights)
    if not symmetric:
        groups = stored.infos[names["weight_scale"]].shape[-1:] or (1,)
        names["weight_zero_point"] = f"{module}.weight_zero_point"
        packed = stored.infos.get(names["weight_zero_point"])
        if packed is not None and packed.dtype == torch.int32:
            stored.expect(names["weight_zero_point"], (torch.int32,), (-(-n * bits // 32), groups[0]))
        else:
            shape = stored.infos[names["weight_scale"]].shape
            stored.expect(names["weight_zero_point"], (torch.int8,), shape)
    if stored.has(f"{module}.weight_g_idx"):
        names["weight_g_idx"] = f"{module}.weight_g_idx"
        stored.expect(names["weight_g_idx"], (torch.int32, torch.int64), (k,))
    label = f"{stored.program} {bits} bits, {_scope(block, (n, k))}"
    return Packed(names, (n, k), label, partial(_unpack, bits=bits, shape=(n, k), block=block, names=names))


def _unpack(
    parts: Parts, *, bits: int, shape: tuple[int, int], block: tuple[int, int], names: Names
) -> QTensor | Tensor:
    n, k = shape
    codes, half = along_rows(parts["weight_packed"], bits, k), 1 << (bits - 1)
    scale = _by_row(parts["weight_scale"], n, block[0])
    zero = None
    if (stored := parts.get("weight_zero_point")) is not None:
        down = scale.shape[0]
        packed = stored.dtype == torch.int32
        zero = along_rows(stored.T, bits, down).T if packed else (_by_row(stored, n, block[0]).short() + half).byte()
        zero = zero.contiguous()
    index = torch.arange(k) // block[1]
    said = parts["weight_g_idx"].long() if "weight_g_idx" in parts else index
    if torch.equal(said, index) or bool((said == -1).all()):  # -1: never set, as without an order
        return integers(codes, bits, scale, zero, block[1])
    if int(said.min()) < 0 or int(said.max()) >= scale.shape[1]:
        raise CheckpointError(f"names a group that is none of its {scale.shape[1]}", where=names["weight_g_idx"])
    whole = torch.full_like(scale, half, dtype=torch.uint8) if zero is None else zero
    return by_columns(codes, scale, whole, said)


def _scope(block: tuple[int, int], shape: tuple[int, int]) -> str:
    if block == shape:
        return "a scale for the tensor"
    if block[0] > 1:
        return f"blocks of {block[0]} x {block[1]}"
    return "a scale for each row" if block[1] >= shape[1] else f"groups of {block[1]}"


def _naive(stored: Stored, module: str, weights: Mapping[str, Any]) -> Packed:
    names = {part: f"{module}.{part}" for part in ("weight", "weight_scale")}
    n, k = stored.expect(names["weight"], (torch.int8, *_FP8), (None, None))
    block = _scale(stored, names["weight_scale"], (n, k), weights)
    ints = stored.infos[names["weight"]].dtype == torch.int8
    if stored.has(f"{module}.weight_zero_point") and ints:
        names["weight_zero_point"] = f"{module}.weight_zero_point"
        stored.expect(names["weight_zero_point"], (torch.int8,), stored.infos[names["weight_scale"]].shape)
    kind = "8-bit integers" if ints else "FP8"
    decode = partial(_unpack8, n=n, block=block)
    return Packed(names, (n, k), f"{stored.program} {kind}, {_scope(block, (n, k))}", decode)


def _unpack8(parts: Parts, *, n: int, block: tuple[int, int]) -> QTensor | Tensor:
    w, scale = parts["weight"], _by_row(parts["weight_scale"], n, block[0])
    if w.dtype != torch.int8:
        return floats8(w, scale, block[1])
    zero = parts.get("weight_zero_point")
    zero = None if zero is None else _unsigned(_by_row(zero, n, block[0]))
    return integers(_unsigned(w), 8, scale, zero, block[1])


def _unsigned(w: Tensor) -> Tensor:
    """int8 plus 128, as uint8."""
    return w.contiguous().view(torch.uint8) ^ 0x80


def _nvfp4(stored: Stored, module: str, weights: Mapping[str, Any]) -> Packed:
    names = {part: f"{module}.{part}" for part in ("weight_packed", "weight_scale", "weight_global_scale")}
    n, half = stored.expect(names["weight_packed"], _BYTES, (None, None))
    stored.expect(names["weight_scale"], (torch.float8_e4m3fn,), (n, half // 8))
    stored.expect(names["weight_global_scale"], (torch.float32,), (1,))
    if half % 8:
        raise stored.damaged(names["weight_packed"], f"has rows of {2 * half} weights, no whole groups of 16")
    return Packed(names, (n, 2 * half), f"{stored.program} NVFP4", partial(_divided, names=names))


def _divided(parts: Parts, *, names: Names) -> QTensor:
    whole = parts["weight_global_scale"].float()
    if not bool(torch.isfinite(whole).all()) or not float(whole):
        raise CheckpointError(f"is {float(whole)}", where=names["weight_global_scale"])
    every = torch.tensor([p for p in E4M3.points if p == p])
    usual = bool((parts["weight_scale"].view(torch.uint8) < 0x7F).all())
    if usual and torch.equal(every * (1 / whole), every / whole):
        return nvfp4(parts["weight_packed"], parts["weight_scale"], 1 / whole)
    # What it divides by has no reciprocal: scales of 32 bits hold the same numbers, those of 8 would not.
    return floats4(parts["weight_packed"], parts["weight_scale"].float() / whole, 16)


def _mxfp4(stored: Stored, module: str, weights: Mapping[str, Any]) -> Packed:
    names = {part: f"{module}.{part}" for part in ("weight_packed", "weight_scale")}
    n, half = stored.expect(names["weight_packed"], _BYTES, (None, None))
    stored.expect(names["weight_scale"], _BYTES, (n, half // 16))
    if half % 16:
        raise stored.damaged(names["weight_packed"], f"has rows of {2 * half} weights, no whole groups of 32")
    label = f"{stored.program} MXFP4"
    return Packed(names, (n, 2 * half), label, lambda parts: mxfp4(parts["weight_packed"], parts["weight_scale"]))


_KINDS = {
    "pack-quantized": _packed,
    "int-quantized": _naive,
    "float-quantized": _naive,
    "naive-quantized": _naive,
    "nvfp4-pack-quantized": _nvfp4,
    "mxfp4-pack-quantized": _mxfp4,
}
