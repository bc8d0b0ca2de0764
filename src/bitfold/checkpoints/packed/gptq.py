"""GPTQ's container, as AutoGPTQ, GPTQModel and AutoRound write it.

    qweight  int32 (k * bits / 32, n)   codes of a column one after the other down the words, lowest bits first
    qzeros   int32 (groups, n * bits / 32), the same along a row; "gptq" (v1) stores zero - 1, "gptq_v2" stores zero
    scales   (groups, n)
    g_idx    int32 (k,)                 the group of each input; only with desc_act is it not 0 0 ... 1 1 ...

weight = (code - zero) * scale. Source: GPTQModel 7.7, `nn_modules/qlinear/__init__.py` and `utils/model.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bitfold.checkpoints.packed.base import FLOATS, Packed, Parts, Stored
from bitfold.checkpoints.packed.fields import along_rows, by_columns, integers
from bitfold.errors import CheckpointError
from bitfold.qtensor import QTensor

BITS = (2, 3, 4, 8)
_MINUS_ONE = {"gptq": True, "gptq_v2": False}
_INT32 = (torch.int32,)


def read_gptq(stored: Stored) -> dict[str, Packed]:
    """The weights of GPTQ's `qweight`, `qzeros`, `scales`, and perhaps `g_idx`."""
    said = stored.settings
    kind = str(said.get("checkpoint_format") or said.get("format") or "gptq")
    if kind not in _MINUS_ONE:
        stored.refuse(f"checkpoint_format {kind[:40]!r} ({', '.join(_MINUS_ONE)} are read)")
    if said.get("is_marlin_format"):
        stored.refuse("packed for Marlin")
    if said.get("pack_dtype", "int32") != "int32":
        stored.refuse(f"packed in {str(said['pack_dtype'])[:40]}")
    if said.get("adapter"):
        stored.refuse("with an adapter beside the weights")
    return columns_packed(stored, minus_one=_MINUS_ONE[kind], mixed=bool(said.get("dynamic")))


def read_auto_round(stored: Stored) -> dict[str, Packed]:
    """AutoRound's own config of GPTQ's container (`auto_round:auto_gptq`) or AWQ's; bits may differ by layer."""
    from bitfold.checkpoints.packed.awq import rows_packed

    kind = str(stored.settings.get("packing_format", "auto_round:auto_gptq")).removeprefix("auto_round:")
    if stored.settings.get("data_type", "int") != "int":
        stored.refuse(f"numbers of type {str(stored.settings['data_type'])[:40]}")
    if kind in ("auto_gptq", "gptq"):
        return columns_packed(stored, minus_one=True, mixed=bool(stored.settings.get("extra_config")))
    if kind in ("auto_awq", "awq"):
        return rows_packed(stored)
    stored.refuse(f"packing_format {kind[:40]!r} (auto_gptq and auto_awq are read)")


def columns_packed(stored: Stored, *, minus_one: bool, mixed: bool) -> dict[str, Packed]:
    """Weights of words down the columns.

    Args:
        stored: the checkpoint.
        minus_one: zero points are stored less one.
        mixed: layers may have other bits and groups than the settings say.
    """
    group = stored.number("group_size", -1)
    bits = stored.number("bits")
    found = {}
    for module in stored.ending(".qweight"):
        layer = _Layer.of(stored, module, minus_one, (group, mixed))
        if not mixed and layer.bits != bits:
            raise stored.damaged(f"{module}.qzeros", f"is of {layer.bits} bits, the config says {bits}")
        how = "a scale for each row" if layer.group >= layer.k else f"groups of {layer.group}"
        label = f"{stored.program} {layer.bits} bits, {how}"
        found[f"{module}.weight"] = Packed(layer.parts, (layer.n, layer.k), label, layer.decode)
    return found


class _Layer:
    """One linear layer.

    Args:
        where: the layer, for messages.
        sizes: bits of a code, outputs n, inputs k, inputs of a group.
        minus_one: zero points are stored less one.
        parts: names of its tensors.
    """

    def __init__(self, where: str, sizes: tuple[int, int, int, int], minus_one: bool, parts: Mapping[str, str]) -> None:
        self.where, self.minus_one, self.parts = where, minus_one, parts
        self.bits, self.n, self.k, self.group = sizes

    @classmethod
    def of(cls, stored: Stored, module: str, minus_one: bool, said: tuple[int, bool]) -> _Layer:
        """The layer of that name, of the inputs of a group that the config says, or others if it may have them.

        CheckpointError where its tensors do not fit together.
        """
        names = {part: f"{module}.{part}" for part in ("qweight", "qzeros", "scales")}
        groups, n = stored.expect(names["scales"], FLOATS, (None, None))
        _, zero_words = stored.expect(names["qzeros"], _INT32, (groups, None))
        words, _ = stored.expect(names["qweight"], _INT32, (None, n))
        bits = 32 * zero_words // n
        if bits not in BITS or n * bits != 32 * zero_words:
            raise stored.damaged(names["qzeros"], f"cannot be {n} zero points of {', '.join(map(str, BITS))} bits")
        k = 32 * words // bits
        if k * bits != 32 * words:
            raise stored.damaged(
                names["qweight"], f"has {words} words in a column, no whole number of codes of {bits} bits"
            )
        if stored.has(f"{module}.g_idx") or stored.settings.get("desc_act"):
            names["g_idx"] = f"{module}.g_idx"
            stored.expect(names["g_idx"], (torch.int32, torch.int64), (k,))
        return cls(module, (bits, n, k, _group(stored, names["scales"], (k, groups), said)), minus_one, names)

    def decode(self, parts: Parts) -> QTensor | Tensor:
        """See `Packed`."""
        codes = along_rows(parts["qweight"].T, self.bits, self.k)
        zero = along_rows(self._zeros(parts["qzeros"]), self.bits, self.n).T.contiguous()
        if self.minus_one and self.bits == 3:
            zero = (zero + 1) & 7
        scale = parts["scales"].T.contiguous()
        index = torch.arange(self.k) // self.group
        said = parts["g_idx"].long() if "g_idx" in parts else index
        if int(said.min()) < 0 or int(said.max()) >= scale.shape[1]:
            raise CheckpointError(f"names a group that is none of its {scale.shape[1]}", where=self.parts["g_idx"])
        if torch.equal(said, index):
            return integers(codes, self.bits, scale, zero, self.group)
        return by_columns(codes, scale, zero, said)

    def _zeros(self, words: Tensor) -> Tensor:
        # One is added to words, not to their parts, as GPTQModel does: it takes one from words as well, so that a zero
        # point of 0 borrows from its neighbour and comes back. 3 bits cross words; there it adds to the parts.
        if not self.minus_one or self.bits == 3:
            return words
        ones = sum(1 << at for at in range(0, 32, self.bits))
        total = (words.long() + ones) & 0xFFFFFFFF
        return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def _group(stored: Stored, name: str, sizes: tuple[int, int], said: tuple[int, bool]) -> int:
    """Inputs of a group: what the config says, or for layers of their own what the number of groups does."""
    (k, groups), (wanted, mixed) = sizes, said
    wanted = k if wanted <= 0 else wanted
    if -(-k // wanted) == groups:
        return wanted
    if mixed and k % groups == 0:
        return k // groups
    raise stored.damaged(name, f"has {groups} groups, {k} inputs in groups of {wanted} make {-(-k // wanted)}")
