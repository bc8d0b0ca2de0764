"""AWQ's "gemm" container, as AutoAWQ and GPTQModel write it; always 4 bits.

    qweight  int32 (k, n / 8)        eight outputs in a word, in the order 0 2 4 6 1 3 5 7, lowest bits first
    qzeros   int32 (groups, n / 8)   the same
    scales   (groups, n)

weight = (code - zero) * scale. Source: AutoAWQ 0.2.9, `modules/linear/gemm.py` and `utils/packing_utils.py`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bitfold.checkpoints.packed.base import FLOATS, Packed, Parts, Stored
from bitfold.checkpoints.packed.fields import along_rows, integers
from bitfold.qtensor import QTensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that lies at each place of a word
_INT32 = (torch.int32,)


def read_awq(stored: Stored) -> dict[str, Packed]:
    """The weights of AWQ's `qweight`, `qzeros`, `scales`."""
    said = stored.settings
    version = str(said.get("version") or said.get("checkpoint_format") or said.get("format") or "gemm").lower()
    if version != "gemm":
        stored.refuse(f"version {version[:40]!r} (gemm is read)")
    return rows_packed(stored)


def rows_packed(stored: Stored) -> dict[str, Packed]:
    """Weights of words along the outputs."""
    bits = stored.number("bits") if "bits" in stored.settings else stored.number("w_bit")
    if bits != 4:
        stored.refuse(f"{bits} bits (4 are read)")
    found = {}
    for module in stored.ending(".qweight"):
        names = {part: f"{module}.{part}" for part in ("qweight", "qzeros", "scales")}
        groups, n = stored.expect(names["scales"], FLOATS, (None, None))
        if n % 8:
            raise stored.damaged(names["scales"], f"has {n} outputs, no whole number of words")
        k, _ = stored.expect(names["qweight"], _INT32, (None, n // 8))
        stored.expect(names["qzeros"], _INT32, (groups, n // 8))
        if k % groups:
            raise stored.damaged(names["scales"], f"has {groups} groups for {k} inputs")
        label = f"{stored.program} 4 bits, groups of {k // groups}"
        found[f"{module}.weight"] = Packed(names, (n, k), label, partial(_decode, group=k // groups))
    return found


def _decode(parts: Parts, *, group: int) -> QTensor | Tensor:
    codes, zero = (_in_order(parts[part]) for part in ("qweight", "qzeros"))
    return integers(codes, 4, parts["scales"].T.contiguous(), zero, group)


def _in_order(words: Tensor) -> Tensor:
    """uint8 (n, rows) of words (rows, n / 8)."""
    places = torch.tensor(ORDER).argsort()
    codes = along_rows(words, 4, 8 * words.shape[1])
    return codes.view(words.shape[0], -1, 8)[..., places].reshape(words.shape[0], -1).T.contiguous()
