"""compressed-tensors' folders: the inverse of compressed.py.

pack-quantized        integers of 2, 4, 8 bits, in groups or rows, symmetric or with zero points
int-quantized         W8A8: int8 with a scale for each row, activations of 8 bits, by token or static
float-quantized       FP8 (E4M3) with a scale for each row or the tensor
nvfp4-pack-quantized, mxfp4-pack-quantized
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitfold.checkpoints.packed.written import (
    FP8,
    I32,
    INT,
    MXFP4,
    NVFP4,
    Held,
    Named,
    PackedFolder,
    held_of,
    module_of,
    words,
)
from bitfold.checkpoints.schema import Entry
from bitfold.errors import CheckpointError
from bitfold.formats.grids import E4M3
from bitfold.formats.packing import pack, unpack
from bitfold.system.tensorinfo import TensorInfo
from bitfold.transforms.activations import ACT_SCALE

_FORMATS = {FP8: "float-quantized", MXFP4: "mxfp4-pack-quantized", NVFP4: "nvfp4-pack-quantized"}
_BYTES = {MXFP4: "torch.uint8", NVFP4: "torch.float8_e4m3fn"}  # dtypes of scales, where a format says so
_EIGHT = {"num_bits": 8, "type": "int", "symmetric": True}
_ACTIVATIONS = {
    "float": None,
    "int8": {**_EIGHT, "strategy": "token", "dynamic": True},
    "int8-static": {**_EIGHT, "strategy": "tensor", "dynamic": False},
}


class CompressedFolder(PackedFolder):
    """compressed-tensors: a group of modules for each kind of weights."""

    program = "compressed-tensors"
    _by_energy = False  # columns were coded by the size of their inputs, groups staying where they are

    def finish(self, config: Mapping[str, Any], quantization: Mapping[str, Any] | None = None) -> None:
        """See `PackedFolder`; `actorder` is said where the recipe has no other method than gptq."""
        rules = [rule for rule in (quantization or {}).get("recipe", ()) if rule["format"] != "keep"]
        self._by_energy = bool(rules) and all(rule["method"].partition(":")[0] == "gptq" for rule in rules)
        super().finish(config, quantization)

    def check_together(self, found: Mapping[str, Held]) -> None:
        """See `PackedFolder`: all go together."""
        some = any(what.kind == NVFP4 for what in found.values())
        self.but_for = "the last bit of NVFP4's global scales" if some else ""

    def check(self, name: str, what: Held, entry: Entry) -> None:
        """See `PackedFolder`."""
        k = entry.shape[-1]
        if what.kind == INT and what.bits not in (2, 4, 8):
            raise CheckpointError(f"has {what.bits} bits, engines read 2, 4 and 8", where=name, hint="--bits 4")
        if what.group > 0 and k % what.group:
            raise CheckpointError(f"has rows of {k}, no whole groups of {what.group}", where=name, hint="--group-size")
        if what.act != "float" and (what.kind, what.bits, what.zeros, what.group) != (INT, 8, False, 0):
            said = "8-bit activations want symmetric 8-bit weights with a scale for each row"
            raise CheckpointError(said, where=name, hint="int8")
        if what.kind == INT and what.group < 0:
            raise CheckpointError("has one scale for the tensor", where=name, hint="int8")

    def layout_of(self, entry: Entry, what: Held) -> dict[str, TensorInfo]:
        """See `PackedFolder`."""
        n, k = entry.shape
        scale = entry.layout()["scale"]
        if _format_of(what) in ("int-quantized", "float-quantized"):
            dtype = torch.float8_e4m3fn if what.kind == FP8 else torch.int8
            scale = TensorInfo(scale.dtype, (1,)) if what.group < 0 else scale
            static = {"input_scale": TensorInfo(torch.float32, (1,))} if what.act == "int8-static" else {}
            return {"weight": TensorInfo(dtype, (n, k)), "weight_scale": scale, **static}
        if what.kind != INT:
            dtype = torch.float8_e4m3fn if what.kind == NVFP4 else torch.uint8
            whole = {"weight_global_scale": TensorInfo(torch.float32, (1,))} if what.kind == NVFP4 else {}
            packed = {"weight_packed": TensorInfo(torch.uint8, (n, k // 2))}
            return {**packed, "weight_scale": TensorInfo(dtype, scale.shape), **whole}
        found = {
            "weight_packed": TensorInfo(I32, (n, -(-k * what.bits // 32))),
            "weight_scale": scale,
            "weight_shape": TensorInfo(torch.int64, (2,)),
        }
        if what.zeros:
            found["weight_zero_point"] = TensorInfo(I32, (-(-n * what.bits // 32), scale.shape[1]))
        return found

    def parts_of(self, name: str, entry: Entry, fields: Mapping[str, Tensor]) -> Named:
        """See `PackedFolder`."""
        what, scale = held_of(name, entry), fields["scale"]
        if what.kind == FP8:
            scale = scale.reshape(1) if what.group < 0 else scale
            return {"weight": fields["codes"].view(torch.float8_e4m3fn), "weight_scale": scale}
        if what.kind == MXFP4:
            return {"weight_packed": fields["codes"], "weight_scale": scale}
        if what.kind == NVFP4:
            whole, loss = _divisor(fields["scale_of_scale"])
            self.rounded |= {name: loss} if loss else {}
            scale = scale.view(torch.float8_e4m3fn)
            return {"weight_packed": fields["codes"], "weight_scale": scale, "weight_global_scale": whole}
        if what.act != "float":
            static = {"input_scale": fields[ACT_SCALE]} if ACT_SCALE in fields else {}
            return {"weight": (fields["codes"] ^ 0x80).view(torch.int8), "weight_scale": scale, **static}
        found = {
            "weight_packed": words(fields["codes"]),
            "weight_scale": scale,
            "weight_shape": torch.tensor(entry.shape),
        }
        if what.zeros:
            zero = unpack(fields["zero_point"], what.bits, scale.shape[1])
            found["weight_zero_point"] = words(pack(zero.T.contiguous(), what.bits)).T.contiguous()
        return found

    def settings(self) -> dict[str, Any]:
        """See `PackedFolder`."""
        kinds: dict[Held, list[str]] = {}
        for name, what in self.kinds().items():
            kinds.setdefault(what, []).append(module_of(name))
        formats = {what: _format_of(what) for what in kinds}
        groups = {
            f"group_{i}": {
                "targets": ["Linear"] if len(kinds) == 1 else modules,
                "weights": _weights(what, by_energy=self._by_energy),
                "input_activations": _ACTIVATIONS[what.act],
                "output_activations": None,
                "format": formats[what],
            }
            for i, (what, modules) in enumerate(kinds.items())
        }
        return {
            "quant_method": "compressed-tensors",
            "format": next(iter(formats.values())) if len(set(formats.values())) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": self.plain_modules(),
            "kv_cache_scheme": None,
        }

    def engines(self) -> dict[str, str]:
        """See `PackedFolder`."""
        every = set(self.kinds().values())
        cpu = all(what.act != "float" or (what.kind, what.bits) == (INT, 4) for what in every)
        vllm = "yes" if cpu else "yes, on a GPU: on a CPU it has integers of 4 bits, and W8A8"
        zeros = "; version 0.20 of it fails on zero points" if any(what.zeros for what in every) else ""
        return {"vLLM": vllm, "transformers": f"yes, where compressed-tensors is installed{zeros}"}


def _format_of(what: Held) -> str:
    if what.kind == INT:
        return "pack-quantized" if what.act == "float" else "int-quantized"
    return _FORMATS[what.kind]


def _weights(what: Held, *, by_energy: bool) -> dict[str, Any]:
    """The arguments of the weights of a group of modules."""
    strategy: dict[str, Any] = {"strategy": "tensor" if what.group < 0 else "channel"}
    if what.group > 0:
        strategy = {"strategy": "tensor_group" if what.kind == NVFP4 else "group", "group_size": what.group}
    if what.kind in _BYTES:
        strategy |= {"scale_dtype": _BYTES[what.kind], "zp_dtype": _BYTES[what.kind]}
    if by_energy and what.kind == INT and what.group > 0:
        strategy |= {"actorder": "weight"}
    kind = "int" if what.kind == INT else "float"
    return {"num_bits": what.bits, "type": kind, "symmetric": not what.zeros, **strategy, "dynamic": False}


def _divisor(whole: Tensor) -> tuple[Tensor, float]:
    """What the scales of NVFP4 are to be divided by, where ours are multiplied by `whole`, float32 (1,).

    Returns:
        The divisor, and the relative square error of the weights: 0 where it gives the very same scales, else that of
        rounding in the last bit of float32.
    """
    every = torch.tensor([p for p in E4M3.points if p == p])
    about = whole.reciprocal()
    near = [about, torch.nextafter(about, about * 2), torch.nextafter(about, about / 2)]
    found = next((g for g in near if torch.equal(every / g, every * whole)), None)
    if found is not None:
        return found, 0.0
    off = (every.double() / about.double() - every.double() * whole.double()).square().sum()
    return about, float(off / (every.double() * whole.double()).square().sum())
