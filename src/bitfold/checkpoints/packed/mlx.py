"""MLX: `mlx_lm.convert -q`, whose config says `"quantization": {"group_size": 64, "bits": 4}`, also by module.

    weight  uint32 (n, k * bits / 32)   codes along a row, one string of bits, lowest first
    scales, biases (n, k / group_size)

weight = code * scale + bias. mlx-lm changes the names and the values of some families when it converts them; only those
are read that it leaves alone. Source: mlx 0.32, `mx.quantize`; mlx-lm, `models/*.py` (`sanitize`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bitfold.checkpoints.packed.base import FLOATS, Packed, Parts, Stored
from bitfold.checkpoints.packed.fields import along_rows

BITS = (2, 3, 4, 5, 6, 8)
# Families whose tensors mlx-lm writes with the names and the values of the original.
_AS_THEY_WERE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2")


def read_mlx(stored: Stored) -> dict[str, Packed]:
    """Weights with `scales` and `biases` beside them."""
    family = str(stored.config.get("model_type"))
    if family not in _AS_THEY_WERE:
        stored.refuse(f"of the family {family[:40]!r}, whose tensors it changes ({', '.join(_AS_THEY_WERE)} are read)")
    found = {}
    for module in stored.ending(".scales"):
        names = {part: f"{module}.{part}" for part in ("weight", "scales", "biases")}
        bits, group = _sizes(stored, module)
        n, groups = stored.expect(names["scales"], FLOATS, (None, None))
        stored.expect(names["weight"], (torch.uint32,), (n, groups * group * bits // 32))
        stored.expect(names["biases"], FLOATS, (n, groups))
        label = f"{stored.program} {bits} bits, groups of {group}"
        decode = partial(_decode, bits=bits, group=group)
        found[names["weight"]] = Packed(names, (n, groups * group), label, decode)
    return found


def _sizes(stored: Stored, module: str) -> tuple[int, int]:
    """Bits and weights of a group of a module."""
    own: Any = stored.settings.get(module)
    said = {**stored.settings, **own} if isinstance(own, dict) else stored.settings
    if said.get("mode", "affine") != "affine":
        stored.refuse(f"mode {str(said['mode'])[:40]!r} (affine is read)")
    bits, group = said.get("bits"), said.get("group_size", 64)
    if bits not in BITS or type(group) is not int or group < 1 or group * int(bits) % 32:
        stored.refuse(f"{str(bits)[:20]} bits in groups of {str(group)[:20]}")
    return int(bits), group


def _decode(parts: Parts, *, bits: int, group: int) -> Tensor:
    scale, bias = (parts[part].float()[..., None] for part in ("scales", "biases"))
    n, groups, _ = scale.shape
    codes = along_rows(parts["weight"].view(torch.int32), bits, groups * group).view(n, groups, group)
    return codes.float().mul_(scale).add_(bias).view(n, groups * group)
