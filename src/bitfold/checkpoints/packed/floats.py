"""Numbers of 8 and 4 bits in floating point, as large models are published.

    fp8 (DeepSeek, Qwen ...)  X float8 (..., n, k), X_scale_inv for blocks of weight_block_size; or X_scale, one for a
                              tensor or a row
    ModelOpt NVFP4            weight uint8 (n, k / 2), weight_scale E4M3 (n, k / 16), times weight_scale_2 ()
    mxfp4 (gpt-oss)           X_blocks uint8 (experts, n, k / 32, 16), X_scales uint8 (experts, n, k / 32); the model
                              has X (experts, k, n)

Of two numbers in a byte the first is the low half. Sources: `integrations/finegrained_fp8.py` and
`integrations/mxfp4.py` of transformers 5.24; ModelOpt, `torch/quantization/qtensor/nvfp4_tensor.py`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bitfold.checkpoints.packed.base import FLOATS, Packed, Parts, Stored
from bitfold.checkpoints.packed.fields import floats8, mxfp4, nvfp4
from bitfold.errors import CheckpointError
from bitfold.qtensor import QTensor

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def read_fp8(stored: Stored) -> dict[str, Packed]:
    """Every tensor of FP8, with the scales that lie beside it."""
    rows, cols = _block(stored)
    found = {}
    for name, info in stored.infos.items():
        if info.dtype not in FP8 or len(info.shape) not in (2, 3):
            continue
        *lead, n, k = stored.expect(name, FP8, (None,) * len(info.shape))
        inverse, plain = f"{name}_scale_inv", f"{name}_scale"
        if stored.has(inverse) and (stored.settings.get("weight_block_size") or stored.infos[inverse].numel > 1):
            scale, block = inverse, (rows, cols)
            stored.expect(scale, (*FLOATS, torch.float8_e8m0fnu), (*lead, -(-n // rows), -(-k // cols)))
        else:
            scale = inverse if stored.has(inverse) else plain
            if not stored.has(scale):
                raise stored.damaged(name, "has no scales beside it")
            per_row = tuple(stored.infos[scale].shape) == (*lead, n, 1) and n > 1
            block = (1, k) if per_row else (n, k)
            stored.expect(scale, FLOATS, (*lead, n, 1) if per_row else (1,) * len(stored.infos[scale].shape))
        label = f"{stored.program} FP8, " + (f"blocks of {rows} x {cols}" if block == (rows, cols) else "a scale each")
        found[name] = Packed({"weight": name, "scale": scale}, info.shape, label, partial(_fp8, block=block))
    return found


def _block(stored: Stored) -> tuple[int, int]:
    found = stored.settings.get("weight_block_size") or [128, 128]
    if not isinstance(found, list) or len(found) != 2 or any(type(b) is not int or b < 1 for b in found):
        stored.refuse(f"blocks of {str(found)[:40]}")
    return found[0], found[1]


def _fp8(parts: Parts, *, block: tuple[int, int]) -> QTensor | Tensor:
    w, scale = parts["weight"], parts["scale"]
    scale = scale.float() if scale.dtype == torch.float8_e8m0fnu else scale
    if w.ndim == 3:
        return torch.stack(
            [_fp8({"weight": w[i], "scale": _of(scale, i)}, block=block).dequantize() for i in range(len(w))]
        )
    n = w.shape[0]
    scale = scale.reshape(1, 1) if scale.numel() == 1 else scale
    by_row = scale if block[0] == 1 or len(scale) == 1 else scale.repeat_interleave(block[0], 0)[:n]
    return floats8(w, by_row, block[1])


def _of(scale: Tensor, expert: int) -> Tensor:
    return scale[expert] if scale.ndim == 3 else scale


def read_model_opt(stored: Stored) -> dict[str, Packed]:
    """ModelOpt's NVFP4 and FP8, whichever a layer has."""
    found = read_fp8(_without_scales(stored))
    for module in stored.ending(".weight_scale_2"):
        names = {"weight": f"{module}.weight", "scale": f"{module}.weight_scale", "whole": f"{module}.weight_scale_2"}
        n, half = stored.expect(names["weight"], (torch.uint8,), (None, None))
        if half % 8:
            raise stored.damaged(names["weight"], f"has rows of {2 * half} weights, no whole groups of 16")
        stored.expect(names["scale"], (torch.float8_e4m3fn,), (n, half // 8))
        if stored.infos[names["whole"]].shape not in ((), (1,)) or stored.infos[names["whole"]].dtype != torch.float32:
            raise stored.damaged(names["whole"], "is not one float32")
        found[names["weight"]] = Packed(names, (n, 2 * half), f"{stored.program} NVFP4", partial(_nvfp4, names=names))
    return found


def _without_scales(stored: Stored) -> Stored:
    """The tensors that are not scales of NVFP4, which are FP8 themselves."""
    from dataclasses import replace

    scales = {f"{module}.weight_scale" for module in stored.ending(".weight_scale_2")}
    return replace(stored, infos={name: info for name, info in stored.infos.items() if name not in scales})


def _nvfp4(parts: Parts, *, names: dict[str, str]) -> QTensor:
    if bool((parts["scale"].view(torch.uint8) >= 0x7F).any()):
        raise CheckpointError("holds scales that are negative or no numbers", where=names["scale"])
    return nvfp4(parts["weight"], parts["scale"], parts["whole"].reshape(1))


def read_mxfp4(stored: Stored) -> dict[str, Packed]:
    """The experts of gpt-oss."""
    found = {}
    for name in stored.ending("_blocks"):
        names = {"blocks": f"{name}_blocks", "scales": f"{name}_scales"}
        experts, n, groups, _ = stored.expect(names["blocks"], (torch.uint8,), (None, None, None, 16))
        stored.expect(names["scales"], (torch.uint8,), (experts, n, groups))
        shape = (experts, n, 32 * groups)
        found[name] = Packed(names, shape, f"{stored.program} MXFP4", _mxfp4, transposed=True)
    return found


def _mxfp4(parts: Parts) -> QTensor:
    return mxfp4(parts["blocks"].flatten(2), parts["scales"])
