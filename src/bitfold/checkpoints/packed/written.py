"""Folders for other engines (implement `Target`): compressed-tensors, GPTQ, AWQ. The inverse of their readers.

Integers of ours go over as they are: the same codes, scales and zero points in another order. What an engine has no
words for is refused when places are given, before any work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfold.checkpoints.base import Source
from bitfold.checkpoints.folder import SafetensorsFolder
from bitfold.checkpoints.packed.awq import ORDER
from bitfold.checkpoints.safetensors import write_json
from bitfold.checkpoints.schema import Content, Entry
from bitfold.errors import CheckpointError
from bitfold.formats.grids import Grid, ints, uints
from bitfold.formats.packing import pack, unpack
from bitfold.system.tensorinfo import TensorInfo
from bitfold.version import __version__

_I32 = torch.int32
_HEAD = "lm_head"
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Ints:
    """Integers with scales, as all these engines have them.

    Args:
        bits: of a code.
        group: inputs that share a scale; 0: a whole row.
        zeros: with zero points; else they are symmetric.
        act: activations are rounded to 8 bits, token by token.
    """

    bits: int
    group: int
    zeros: bool
    act: bool = False


def ints_of(name: str, entry: Entry) -> Ints:
    """What a packed weight is, for engines that know integers alone; CheckpointError where it is something else."""
    form, scale = entry.format, entry.format.scale
    hint = (
        'write integers: bitfold quantize --bits 4 --format int4-g128 (or int4-asym-g128), "convert --to safetensors"'
    )
    if entry.transform is not None:
        raise CheckpointError(
            "is stored in another basis (rotated or scaled), which engines cannot undo", where=name, hint=hint
        )
    if len(entry.shape) != 2 or entry.transposed or _is_embedding(name):
        raise CheckpointError("is no linear layer: embeddings and stacks of experts stay plain", where=name, hint=hint)
    if form.grid is None or scale is None or scale.of is not None or isinstance(scale.store, Grid):
        raise CheckpointError(f"is {form.name}, which is no format of integers with scales", where=name, hint=hint)
    bits = form.grid.code_bits
    zeros = scale.offset is not None
    if (
        form.grid != (uints(bits) if zeros else ints(bits))
        or scale.block[0] != 1
        or scale.offset not in (None, form.grid)
    ):
        raise CheckpointError(
            f"is {form.name}, which is no format of integers with scales of rows", where=name, hint=hint
        )
    if entry.act not in ("float", "int8"):
        raise CheckpointError(f"has activations {entry.act}", where=name, hint="--act float, or int8 with 8 bits")
    group = scale.block[1]
    return Ints(bits, 0 if group >= entry.shape[1] else group, zeros, entry.act == "int8")


def _is_embedding(name: str) -> bool:
    return "embed" in name.removesuffix(".weight").rpartition(".")[2]


def _words(packed: Tensor) -> Tensor:
    """int32 (n, words) of rows of bytes, filled with zeros."""
    return torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 4)).contiguous().view(_I32)


class PackedFolder(SafetensorsFolder):
    """See `Target`; what an engine's folders have in common.

    A kind says which weights it can hold (`check`), what it calls their parts (`layout_of`, `parts_of`) and what stands
    in config.json (`settings`).
    """

    program = ""

    def __init__(self, folder: Path, max_shard_bytes: int, source: Source | None = None, variant: str = "") -> None:
        super().__init__(folder, max_shard_bytes, source, variant)
        self._entries: dict[str, Entry] = {}
        self._linear: list[str] = []  # modules that stay plain

    def stored(self, contents: Mapping[str, Content]) -> dict[str, TensorInfo]:
        """See `Target`.

        Raises:
            CheckpointError: a weight that the engine has no words for, or nothing packed at all.
        """
        entries = {name: content for name, content in contents.items() if isinstance(content, Entry)}
        if not entries:
            hint = "bitfold quantize first, with a format of integers"
            raise CheckpointError(f"nothing in it is packed, as {self.program} wants it", hint=hint)
        self.check({name: ints_of(name, entry) for name, entry in entries.items()}, entries)
        found: dict[str, TensorInfo] = {}
        for name, content in contents.items():
            if isinstance(content, Entry):
                found |= {
                    _part(name, part): info for part, info in self.layout_of(content, ints_of(name, content)).items()
                }
            else:
                found[name] = content
        self._entries = entries
        self._linear = [
            _module(n) for n, c in contents.items() if n not in entries and n.endswith(".weight") and len(c.shape) == 2
        ]
        return found

    def layout(self, contents: Mapping[str, Content]) -> None:
        """See `Target`."""
        super().layout(contents)
        self._packed = {name: set(entry.layout()) for name, entry in self._entries.items()}

    def pack(self, name: str, fields: Mapping[str, Tensor]) -> dict[str, str]:
        """See `Target`."""
        entry = self._entries[name]
        if fields.keys() != entry.layout().keys():
            what = f"is packed as {sorted(fields)}, {sorted(entry.layout())} were planned"
            raise CheckpointError(what, where=f"{self.folder}: {name}")
        parts = self.parts_of(name, entry, fields)
        return {_part(name, part): self._open.write(_part(name, part), [w]) for part, w in parts.items()}

    def finish(self, config: Mapping[str, Any], quantization: Mapping[str, Any] | None = None) -> None:
        """See `Target`; in place of bitfold's own words those of the engine."""
        super().finish(config, self.settings())

    def check(self, found: Mapping[str, Ints], entries: Mapping[str, Entry]) -> None:
        """CheckpointError for what the engine cannot hold."""
        raise NotImplementedError

    def layout_of(self, entry: Entry, what: Ints) -> dict[str, TensorInfo]:
        """dtype and shape of each part of a weight."""
        raise NotImplementedError

    def parts_of(self, name: str, entry: Entry, fields: Mapping[str, Tensor]) -> Named:
        """The parts of a weight."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """The quantization_config of config.json."""
        raise NotImplementedError

    def _ints(self) -> dict[str, Ints]:
        return {name: ints_of(name, entry) for name, entry in self._entries.items()}

    def _plain(self) -> list[str]:
        """Linear modules that stay plain, as far as names and shapes tell; the head is one even where it is tied."""
        packed = {_module(name) for name in self._entries}
        found = [module for module in self._linear if not _is_embedding(f"{module}.weight")]
        return found if _HEAD in packed else list(dict.fromkeys([*found, _HEAD]))


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _part(name: str, part: str) -> str:
    return f"{_module(name)}.{part}"


class CompressedFolder(PackedFolder):
    """compressed-tensors: pack-quantized integers of 2, 4, 8 bits, and int-quantized weights with 8-bit activations."""

    program = "compressed-tensors"

    def check(self, found: Mapping[str, Ints], entries: Mapping[str, Entry]) -> None:
        """See `PackedFolder`."""
        for name, what in found.items():
            k = entries[name].shape[-1]
            if what.bits not in (2, 4, 8):
                raise CheckpointError(f"has {what.bits} bits, engines read 2, 4 and 8", where=name, hint="--bits 4")
            if what.group and k % what.group:
                raise CheckpointError(
                    f"has rows of {k}, no whole groups of {what.group}", where=name, hint="--group-size"
                )
            if what.act and (what.bits != 8 or what.zeros or what.group):
                raise CheckpointError(
                    "8-bit activations want symmetric 8-bit weights with a scale for each row", where=name, hint="int8"
                )

    def layout_of(self, entry: Entry, what: Ints) -> dict[str, TensorInfo]:
        """See `PackedFolder`."""
        n, k = entry.shape
        scale = entry.layout()["scale"]
        if what.act:
            return {"weight": TensorInfo(torch.int8, (n, k)), "weight_scale": scale}
        found = {
            "weight_packed": TensorInfo(_I32, (n, -(-k * what.bits // 32))),
            "weight_scale": scale,
            "weight_shape": TensorInfo(torch.int64, (2,)),
        }
        if what.zeros:
            found["weight_zero_point"] = TensorInfo(_I32, (-(-n * what.bits // 32), scale.shape[1]))
        return found

    def parts_of(self, name: str, entry: Entry, fields: Mapping[str, Tensor]) -> Named:
        """See `PackedFolder`."""
        what, (n, k) = ints_of(name, entry), entry.shape
        if what.act:
            return {"weight": (fields["codes"] ^ 0x80).view(torch.int8), "weight_scale": fields["scale"]}
        found = {
            "weight_packed": _words(fields["codes"]),
            "weight_scale": fields["scale"],
            "weight_shape": torch.tensor([n, k]),
        }
        if what.zeros:
            zero = unpack(fields["zero_point"], what.bits, fields["scale"].shape[1])
            found["weight_zero_point"] = _words(pack(zero.T.contiguous(), what.bits)).T.contiguous()
        return found

    def settings(self) -> dict[str, Any]:
        """See `PackedFolder`: a group of modules for each kind of integers."""
        kinds: dict[Ints, list[str]] = {}
        for name, what in self._ints().items():
            kinds.setdefault(what, []).append(_module(name))
        formats = {what: "int-quantized" if what.act else "pack-quantized" for what in kinds}
        groups = {
            f"group_{i}": {
                "targets": ["Linear"] if len(kinds) == 1 else modules,
                "weights": _compressed_args(what),
                "input_activations": _TOKENS if what.act else None,
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
            "ignore": self._plain(),
            "kv_cache_scheme": None,
        }


_TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def _compressed_args(what: Ints) -> dict[str, Any]:
    strategy = {"strategy": "group", "group_size": what.group} if what.group else {"strategy": "channel"}
    return {"num_bits": what.bits, "type": "int", "symmetric": not what.zeros, **strategy, "dynamic": False}


class GptqFolder(PackedFolder):
    """GPTQ's container: 2, 3, 4 or 8 bits, the same everywhere; v1 of symmetric integers, v2 of those with zero points.

    A zero point of 0 is stored as -1 in v1, which borrows from its neighbour: not all readers make 0 of that.
    """

    program = "gptq"
    bits: tuple[int, ...] = (2, 3, 4, 8)

    def check(self, found: Mapping[str, Ints], entries: Mapping[str, Entry]) -> None:
        """See `PackedFolder`."""
        kinds = {replace(what, act=False) for what in found.values()}
        name = next(iter(found))
        if len(kinds) > 1:
            hint = "--to compressed-tensors holds several"
            raise CheckpointError(f"{self.program} has one kind of integers for all layers", where=name, hint=hint)
        what = found[name]
        if what.bits not in self.bits or any(w.act for w in found.values()):
            hint = "--to compressed-tensors"
            said = f"{what.bits} bits and activations in {'integers' if what.act else 'floats'}"
            raise CheckpointError(f"{said} are none of those of {self.program}", where=name, hint=hint)
        for where, entry in entries.items():
            n, k = entry.shape
            if n * what.bits % 32 or k * what.bits % 32 or (what.group and k % what.group):
                raise CheckpointError(f"({n}, {k}) is no whole number of words and groups", where=where)
            if entry.layout()["scale"].dtype == torch.float32:
                raise CheckpointError(f"has scales of 32 bits, {self.program} has 16", where=where)

    def layout_of(self, entry: Entry, what: Ints) -> dict[str, TensorInfo]:
        """See `PackedFolder`."""
        n, k = entry.shape
        groups = entry.layout()["scale"].shape[1]
        return {
            "qweight": TensorInfo(_I32, (k * what.bits // 32, n)),
            "qzeros": TensorInfo(_I32, (groups, n * what.bits // 32)),
            "scales": TensorInfo(torch.float16, (groups, n)),
            "g_idx": TensorInfo(_I32, (k,)),
        }

    def parts_of(self, name: str, entry: Entry, fields: Mapping[str, Tensor]) -> Named:
        """See `PackedFolder`."""
        what, k = ints_of(name, entry), entry.shape[1]
        zero = _zeros(fields, what) - (0 if what.zeros else 1)
        return {
            "qweight": _words(fields["codes"]).T.contiguous(),
            "qzeros": _words(pack(zero.T.contiguous(), what.bits)),
            "scales": _half(fields["scale"], name).T.contiguous(),
            "g_idx": (torch.arange(k) // (what.group or k)).int(),
        }

    def settings(self) -> dict[str, Any]:
        """See `PackedFolder`."""
        what = next(iter(self._ints().values()))
        skip: dict[str, Any] = {
            f"-:^{module.replace('.', chr(92) + '.')}$": {} for module in self._plain() if module != _HEAD
        }
        found = {
            "quant_method": "gptq",
            "bits": what.bits,
            "group_size": what.group or -1,
            "desc_act": False,
            "sym": not what.zeros,
            "lm_head": f"{_HEAD}.weight" in self._entries,
            "checkpoint_format": "gptq_v2" if what.zeros else "gptq",
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"bitfold:{__version__}"]},
        }
        return {**found, "dynamic": skip} if skip else found

    def finish(self, config: Mapping[str, Any], quantization: Mapping[str, Any] | None = None) -> None:
        """See `Target`; the settings in a file of their own as well."""
        write_json(self.folder / "quantize_config.json", self.settings())
        super().finish(config, quantization)


class AwqFolder(GptqFolder):
    """AWQ's "gemm" container: 4 bits, the same everywhere, always with zero points."""

    program = "awq"
    bits = (4,)

    def layout_of(self, entry: Entry, what: Ints) -> dict[str, TensorInfo]:
        """See `PackedFolder`."""
        n, k = entry.shape
        groups = entry.layout()["scale"].shape[1]
        return {
            "qweight": TensorInfo(_I32, (k, n // 8)),
            "qzeros": TensorInfo(_I32, (groups, n // 8)),
            "scales": TensorInfo(torch.float16, (groups, n)),
        }

    def parts_of(self, name: str, entry: Entry, fields: Mapping[str, Tensor]) -> Named:
        """See `PackedFolder`."""
        what, k = ints_of(name, entry), entry.shape[1]
        return {
            "qweight": _ordered(unpack(fields["codes"], 4, k)),
            "qzeros": _ordered(_zeros(fields, what)),
            "scales": _half(fields["scale"], name).T.contiguous(),
        }

    def settings(self) -> dict[str, Any]:
        """See `PackedFolder`."""
        what = next(iter(self._ints().values()))
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": what.group or -1,
            "zero_point": True,
            "modules_to_not_convert": self._plain(),
        }


def _zeros(fields: Mapping[str, Tensor], what: Ints) -> Tensor:
    """uint8 (n, groups)."""
    scale = fields["scale"]
    if what.zeros:
        return unpack(fields["zero_point"], what.bits, scale.shape[1])
    return torch.full(scale.shape, 1 << (what.bits - 1), dtype=torch.uint8)


def _half(scale: Tensor, name: str) -> Tensor:
    """The scales in float16; CheckpointError where it does not hold them."""
    found = scale.half()
    if not torch.equal(found.float(), scale.float()):
        raise CheckpointError(
            "has scales that float16 does not hold", where=name, hint="--to compressed-tensors keeps them"
        )
    return found


def _ordered(codes: Tensor) -> Tensor:
    """int32 (columns, n / 8) of codes (n, columns): eight rows in a word, in the order of AWQ."""
    turned = codes.T.reshape(codes.shape[1], -1, 8)[..., list(ORDER)]
    return _words(pack(turned.reshape(codes.shape[1], -1).contiguous(), 4))
