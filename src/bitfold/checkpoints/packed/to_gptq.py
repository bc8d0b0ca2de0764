"""Folders in GPTQ's container and its kin: the inverse of gptq.py and awq.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitfold.checkpoints.packed.awq import ORDER
from bitfold.checkpoints.packed.written import HEAD, I32, INT, Held, Named, PackedFolder, held_of, module_of, words
from bitfold.checkpoints.safetensors import write_json
from bitfold.checkpoints.schema import Entry
from bitfold.errors import CheckpointError
from bitfold.formats.packing import pack, unpack
from bitfold.system.tensorinfo import TensorInfo
from bitfold.version import __version__


class GptqFolder(PackedFolder):
    """GPTQ's container: 2, 3, 4 or 8 bits, the same everywhere; v1 of symmetric integers, v2 of those with zero points.

    A zero point of 0 is stored as -1 in v1, which borrows from its neighbour: not all readers make 0 of that.
    """

    program = "gptq"
    bits: tuple[int, ...] = (2, 3, 4, 8)

    def check(self, name: str, what: Held, entry: Entry) -> None:
        """See `PackedFolder`."""
        n, k = entry.shape
        if what.kind != INT or what.bits not in self.bits or what.act != "float" or what.group < 0:
            said = "8-bit activations" if what.act != "float" else f"{what.bits} bits ({entry.format.name})"
            hint = "--to compressed-tensors"
            raise CheckpointError(f"{said} are none of those of {self.program}", where=name, hint=hint)
        if n * what.bits % 32 or k * what.bits % 32 or (what.group and k % what.group):
            raise CheckpointError(f"({n}, {k}) is no whole number of words and groups", where=name)
        if entry.layout()["scale"].dtype == torch.float32:
            raise CheckpointError(f"has scales of 32 bits, {self.program} has 16", where=name)

    def check_together(self, found: Mapping[str, Held]) -> None:
        """See `PackedFolder`."""
        if len(set(found.values())) > 1:
            hint = "compressed-tensors and auto-round hold several"
            what = f"{self.program} has one kind of integers for all layers"
            raise CheckpointError(what, where=next(iter(found)), hint=hint)

    def engines(self) -> dict[str, str]:
        """See `PackedFolder`."""
        what = next(iter(self.kinds().values()))
        known = what.bits in (4, 8) and not what.zeros
        vllm = "yes" if what.bits == 4 else "yes, on a GPU: on a CPU it has 4 bits"
        no = "no: of GPTQ it has symmetric integers of 4 and 8 bits"
        return {"vLLM": vllm if known else no, "transformers": "yes, where gptqmodel and optimum are installed"}

    def layout_of(self, entry: Entry, what: Held) -> dict[str, TensorInfo]:
        """See `PackedFolder`."""
        n, k = entry.shape
        groups = entry.layout()["scale"].shape[1]
        return {
            "qweight": TensorInfo(I32, (k * what.bits // 32, n)),
            "qzeros": TensorInfo(I32, (groups, n * what.bits // 32)),
            "scales": TensorInfo(torch.float16, (groups, n)),
            "g_idx": TensorInfo(I32, (k,)),
        }

    def parts_of(self, name: str, entry: Entry, fields: Mapping[str, Tensor]) -> Named:
        """See `PackedFolder`."""
        what, k = held_of(name, entry), entry.shape[1]
        zero = _zeros(fields, what) - (0 if what.zeros else 1)
        return {
            "qweight": words(fields["codes"]).T.contiguous(),
            "qzeros": words(pack(zero.T.contiguous(), what.bits)),
            "scales": _half(fields["scale"], name).T.contiguous(),
            "g_idx": (torch.arange(k) // (what.group or k)).int(),
        }

    def settings(self) -> dict[str, Any]:
        """See `PackedFolder`."""
        what = next(iter(self.kinds().values()))
        skip: dict[str, Any] = {
            f"-:^{module.replace('.', chr(92) + '.')}$": {} for module in self.plain_modules() if module != HEAD
        }
        found = {
            "quant_method": "gptq",
            "bits": what.bits,
            "group_size": what.group or -1,
            "desc_act": False,
            "sym": not what.zeros,
            "lm_head": f"{HEAD}.weight" in self._entries,
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

    def engines(self) -> dict[str, str]:
        """See `PackedFolder`."""
        return {"vLLM": "yes", "transformers": "yes, where gptqmodel and optimum are installed"}

    def layout_of(self, entry: Entry, what: Held) -> dict[str, TensorInfo]:
        """See `PackedFolder`."""
        n, k = entry.shape
        groups = entry.layout()["scale"].shape[1]
        return {
            "qweight": TensorInfo(I32, (k, n // 8)),
            "qzeros": TensorInfo(I32, (groups, n // 8)),
            "scales": TensorInfo(torch.float16, (groups, n)),
        }

    def parts_of(self, name: str, entry: Entry, fields: Mapping[str, Tensor]) -> Named:
        """See `PackedFolder`."""
        what, k = held_of(name, entry), entry.shape[1]
        return {
            "qweight": _ordered(unpack(fields["codes"], 4, k)),
            "qzeros": _ordered(_zeros(fields, what)),
            "scales": _half(fields["scale"], name).T.contiguous(),
        }

    def settings(self) -> dict[str, Any]:
        """See `PackedFolder`."""
        what = next(iter(self.kinds().values()))
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": what.group or -1,
            "zero_point": True,
            "modules_to_not_convert": self.plain_modules(),
        }


class AutoRoundFolder(GptqFolder):
    """AutoRound's config of GPTQ's container: symmetric integers whose bits and groups may differ by layer."""

    program = "auto-round"

    def check(self, name: str, what: Held, entry: Entry) -> None:
        """See `PackedFolder`."""
        super().check(name, what, entry)
        if what.zeros:
            hint = "symmetric integers (int4-g128), or gptq"
            raise CheckpointError("has zero points, which AutoRound's readers take in two ways", where=name, hint=hint)

    def check_together(self, found: Mapping[str, Held]) -> None:
        """See `PackedFolder`."""

    def settings(self) -> dict[str, Any]:
        """See `PackedFolder`: the commonest kind for all, the others by name."""
        kinds = self.kinds()
        usual = Counter(kinds.values()).most_common(1)[0][0]
        others = {module_of(name): _layer(what) for name, what in kinds.items() if what != usual}
        plain = {module: {"bits": 16, "data_type": "float"} for module in self.plain_modules() if module != HEAD}
        found = {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "data_type": "int",
            **_layer(usual),
            "autoround_version": "0.15.1",
            "lm_head": f"{HEAD}.weight" in self._entries,
        }
        return {**found, "extra_config": {**others, **plain}} if others or plain else found

    def finish(self, config: Mapping[str, Any], quantization: Mapping[str, Any] | None = None) -> None:
        """See `Target`."""
        PackedFolder.finish(self, config, quantization)

    def engines(self) -> dict[str, str]:
        """See `PackedFolder`."""
        cpu = all(what.bits == 4 for what in self.kinds().values())
        vllm = "yes" if cpu else "yes, on a GPU: on a CPU it has 4 bits"
        return {"vLLM": vllm, "transformers": "yes, where auto-round is installed"}


def _layer(what: Held) -> dict[str, Any]:
    return {"bits": what.bits, "group_size": what.group or -1, "sym": not what.zeros, "data_type": "int"}


def _zeros(fields: Mapping[str, Tensor], what: Held) -> Tensor:
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
    return words(pack(turned.reshape(codes.shape[1], -1).contiguous(), 4))
