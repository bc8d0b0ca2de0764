"""bitsandbytes: NF4, FP4 and int8.

    4 bits  weight uint8 (n * k / 2, 1), row after row, the first of two codes in the high half;
            weight.quant_map float32 (16,); weight.absmax float32, one for each `blocksize` codes, or uint8 codes of
            weight.nested_quant_map (256,), times weight.nested_absmax, one for each `nested_blocksize` of them, plus
            `nested_offset`;
            weight.quant_state.bitsandbytes__nf4 (or __fp4): a JSON object with the sizes, as uint8
    int8    weight int8 (n, k), SCB float32 (n,): weight = code * SCB / 127

Source: bitsandbytes 0.50, `functional.py` (`QuantState.as_dict`, `dequantize_4bit`, `int8_vectorwise_dequant`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from bitfold.checkpoints.packed.base import Packed, Parts, Stored
from bitfold.checkpoints.packed.fields import normal_floats
from bitfold.checkpoints.untrusted import parse_json_object, shape_of
from bitfold.formats.grids import NF4
from bitfold.formats.packing import unpack
from bitfold.qtensor import QTensor

_STATE = ".quant_state.bitsandbytes__"
_NEAR_127TH = 7.874015718698502e-3  # as bitsandbytes has it
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_LARGEST_STATE = 1 << 16  # bytes


def read_bitsandbytes(stored: Stored) -> dict[str, Packed]:
    """Weights with a quant_state beside them, and those with SCB."""
    found = {}
    for name in list(stored.infos):
        weight, at, kind = name.partition(_STATE)
        if at:
            state = _State.of(stored, weight, name, kind)
            found[weight] = Packed(state.parts, state.shape, f"{stored.program} {kind.upper()}", state.decode)
    for module in stored.ending("SCB"):
        names = {"weight": f"{module}weight", "scale": f"{module}SCB"}
        n, k = stored.expect(names["weight"], (torch.int8,), (None, None))
        stored.expect(names["scale"], (torch.float32,), (n,))
        form = f"{module}weight_format"
        if stored.has(form):
            if stored.infos[form].numel != 1 or int(stored.read(form).reshape(())):
                stored.refuse(f"{form} is not that of plain rows")
            names["form"] = form
        found[names["weight"]] = Packed(names, (n, k), f"{stored.program} int8", _int8)
    return found


def _int8(parts: Parts) -> Tensor:
    # In the order of bitsandbytes: a scale divided beforehand would differ from it in the last bit.
    return parts["weight"].float().mul_(parts["scale"][:, None]).mul_(_NEAR_127TH)


@dataclass(frozen=True)
class _State:
    """What the JSON beside a weight says.

    Args:
        parts: names of the tensors.
        shape: of the weight.
        block: codes that share a scale.
        nested: scales that share one of theirs; 0: they are not coded.
        offset: added to the scales.
    """

    parts: dict[str, str]
    shape: tuple[int, ...]
    block: int
    nested: int
    offset: float

    @classmethod
    def of(cls, stored: Stored, weight: str, name: str, kind: str) -> _State:
        """The state of a weight; CheckpointError where it does not fit the tensors."""
        if kind not in ("nf4", "fp4"):
            stored.refuse(f"numbers of type {kind[:40]}")
        size = stored.expect(name, (torch.uint8,), (None,))[0]
        if size > _LARGEST_STATE:
            raise stored.damaged(name, f"has {size} bytes")
        said = parse_json_object(bytes(stored.read(name).tolist()), name)
        try:
            shape, block = shape_of(said["shape"]), said["blocksize"]
            nested, offset = said.get("nested_blocksize", 0), float(said.get("nested_offset", 0.0))
        except (KeyError, ValueError, TypeError) as error:
            raise stored.damaged(name, f"cannot be understood: {error!r}") from error
        sizes = type(block) is int and block > 0 and type(nested) is int and nested >= 0
        if len(shape) != 2 or 0 in shape or prod(shape) % 2 or not sizes or offset != offset:
            raise stored.damaged(name, f"says shape {shape}, blocks of {str(block)[:20]} and {str(nested)[:20]}")
        parts = {part: f"{weight}.{part}" for part in _PARTS if stored.has(f"{weight}.{part}")}
        state = cls({"weight": weight, "state": name, **parts}, shape, block, nested, offset)
        state._check(stored, weight)
        return state

    def _check(self, stored: Stored, weight: str) -> None:
        count = -(-prod(self.shape) // self.block)
        if stored.infos[weight].numel != prod(self.shape) // 2 if stored.has(weight) else True:
            raise stored.damaged(weight, f"is no weight of shape {self.shape} in half bytes")
        if stored.infos[weight].dtype != torch.uint8:
            stored.refuse(f"codes stored in {str(stored.infos[weight].dtype).removeprefix('torch.')} (uint8 is read)")
        stored.expect(f"{weight}.quant_map", (torch.float32,), (16,))
        scales = torch.uint8 if self.nested else torch.float32
        stored.expect(f"{weight}.absmax", (scales,), (count,))
        if self.nested:
            stored.expect(f"{weight}.nested_quant_map", (torch.float32,), (256,))
            stored.expect(f"{weight}.nested_absmax", (torch.float32,), (-(-count // self.nested),))

    def decode(self, parts: Parts) -> QTensor | Tensor:
        """See `Packed`."""
        n, k = self.shape
        raw, scale, table = parts["weight"].reshape(-1), self._scales(parts), parts["quant_map"]
        codes = (raw << 4) | (raw >> 4)  # the first of two in the low half
        if k % self.block == 0 and k % 2 == 0 and torch.equal(table, torch.tensor(NF4.points)):
            return normal_floats(codes.view(n, k // 2), scale.view(n, -1), self.block)
        values = table[unpack(codes, 4, n * k).int()]
        return values.mul_(scale.repeat_interleave(self.block)[: n * k]).view(n, k)

    def _scales(self, parts: Parts) -> Tensor:
        scale = parts["absmax"]
        if not self.nested:
            return scale
        factor = parts["nested_absmax"].repeat_interleave(self.nested)[: len(scale)]
        return parts["nested_quant_map"][scale.int()] * factor + self.offset
