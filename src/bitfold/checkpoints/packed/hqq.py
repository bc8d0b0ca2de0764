"""HQQ, as transformers saves it: what a layer consists of lies beside it, each fact a tensor of its own.

    W_q      codes, several to a number, the first in the highest bits: of as many equal runs of rows of the (grouped)
             matrix the i-th is the i-th code of every number
    scale, zero    one for each group, in floating point
    nbits, group_size, axis, shape, packing, view_as_float ...

axis 1: groups are runs of a row, the matrix is (n * k / group, group); axis 0: (group, n * k / group).
weight = (code - zero) * scale. Source: hqq 0.2.8, `core/quantize.py`, `core/bitpack.py`, `core/utils.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitfold.checkpoints.packed.base import FLOATS, Packed, Parts, Stored
from bitfold.checkpoints.packed.fields import affine
from bitfold.qtensor import QTensor

_BESIDE = (
    "W_q", "scale", "zero", "nbits", "group_size", "shape", "axis", "packing", "view_as_float", "unpack_view_dtype",
    "quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config",
    "channel_wise", "optimize", "round_zero",
)  # fmt: skip
# bits of a code, bits of the number that it lies in, codes in a number
_PACKINGS = {
    "8bit_u8": (8, torch.uint8, 1), "4bit_u8": (4, torch.uint8, 2), "2bit_u8": (2, torch.uint8, 4),
    "1bit_u8": (1, torch.uint8, 8), "3bit_32": (3, torch.int32, 10),
}  # fmt: skip


def read_hqq(stored: Stored) -> dict[str, Packed]:
    """The weights of `W_q` and what lies beside it."""
    found = {}
    for module in stored.ending(".W_q"):
        layer = _Layer.of(stored, module)
        how = f"groups of {layer.group}" if layer.axis else f"groups of {layer.group} down the outputs"
        label = f"{stored.program} {layer.bits} bits, {how}"
        found[f"{module}.weight"] = Packed(layer.parts, layer.shape, label, layer.decode)
    return found


@dataclass(frozen=True)
class _Layer:
    """One linear layer; `rows` are those of the matrix before it was packed."""

    parts: dict[str, str]
    shape: tuple[int, int]
    group: int
    axis: int
    bits: int
    pieces: int
    rows: int

    @classmethod
    def of(cls, stored: Stored, module: str) -> _Layer:
        """The layer of that name; CheckpointError where its tensors do not fit together."""
        parts = {part: f"{module}.{part}" for part in _BESIDE if stored.has(f"{module}.{part}")}
        for flag in ("quant_scale", "quant_zero", "view_as_float"):
            if flag in parts and _number(stored, parts[flag]):
                stored.refuse(f"with {flag}")
        packing = _text(stored, f"{module}.packing")
        if packing not in _PACKINGS:
            stored.refuse(f"packing {packing[:40]!r} ({', '.join(_PACKINGS)} are read)")
        bits, dtype, pieces = _PACKINGS[packing]
        stored.expect(f"{module}.shape", (torch.int64,), (2,))
        n, k = (int(size) for size in stored.read(f"{module}.shape"))
        axis = _number(stored, f"{module}.axis")
        group = _number(stored, parts["group_size"]) if "group_size" in parts else (k if axis else n)
        if min(n, k, group) < 1 or n * k % group or axis not in (0, 1):
            raise stored.damaged(f"{module}.shape", f"says ({n}, {k}) in groups of {group} along axis {axis}")
        groups = n * k // group
        rows, columns = (groups, group) if axis else (group, groups)
        stored.expect(f"{module}.W_q", (dtype,), (-(-rows // pieces), columns))
        if rows % pieces and bits != 3:
            raise stored.damaged(f"{module}.W_q", f"has {rows} rows, no whole number of pieces")
        for part in ("scale", "zero"):
            stored.expect(f"{module}.{part}", FLOATS, (groups, 1) if axis else (1, groups))
        return cls(parts, (n, k), group, axis, bits, pieces, rows)

    def decode(self, parts: Parts) -> QTensor | Tensor:
        """See `Packed`."""
        raw, (n, k) = parts["W_q"], self.shape
        shifts = range(self.bits * (self.pieces - 1), -1, -self.bits)
        mask = (1 << self.bits) - 1
        codes = torch.cat([((raw >> shift) & mask).to(torch.uint8) for shift in shifts])[: self.rows]
        scale, zero = parts["scale"], parts["zero"]
        if self.axis and k % self.group == 0:
            return affine(codes.view(n, k), self.bits, scale.view(n, -1), zero.view(n, -1), self.group)
        return codes.float().sub_(zero.float()).mul_(scale.float()).view(n, k)


def _number(stored: Stored, name: str) -> int:
    if not stored.has(name) or stored.infos[name].numel != 1 or stored.infos[name].dtype.is_floating_point:
        raise stored.damaged(name, "is not one whole number")
    return int(stored.read(name).reshape(()))


def _text(stored: Stored, name: str) -> str:
    if stored.expect(name, (torch.uint8,), (None,))[0] > 64:
        raise stored.damaged(name, "is no short text")
    return bytes(stored.read(name).tolist()).decode("latin-1")
