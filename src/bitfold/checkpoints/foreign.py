"""What other programs quantized and nothing here reads: found out by name, so that packed codes never pass for weights.

A config that says so is believed. Where it was stripped, the tensors tell: a plain model's weights are floating point
numbers of 16 bits or more. Names alone are no evidence (`scale`, `logit_scale`, `per_expert_scale` are ordinary
parameters), so a scale counts only under a name that no plain model has, or beside a weight of packed numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import torch

from bitfold.checkpoints.headers import ForeignInfo
from bitfold.checkpoints.untrusted import read_json_object
from bitfold.errors import CheckpointError
from bitfold.system.tensorinfo import TensorInfo

HINT = "take the unquantized original, or have the program that quantized it write plain weights first"
_MODEL_OPT = "hf_quant_config.json"
_CONFIGS = ("quantization_config", "compression_config")

# Names that only scales and codes of one program have, whatever their dtype; the first that is found names the method.
_TELLING = tuple(
    (re.compile(rf"(?:^|[.:_])(?:{pattern})$"), method)
    for pattern, method in (
        (r"weight_scale_2|weight_global_scale", "NVFP4"),
        (r"weight_packed|weight_zero_point|weight_g_idx", "compressed-tensors"),
        (r"weight_scale_inv", "FP8 with block scales"),
        (r"qzeros", "GPTQ or AWQ"),
        (r"weight\.(?:nested_)?(?:absmax|quant_map)|weight\.quant_state\..*|SCB", "bitsandbytes"),
        (r"weight\._(?:scale|shift)", "quanto"),
        (r"weight:(?:scale|qdata|_data)|_weight_(?:qdata|scale)", "torchao"),
        (r"weight_quantizer\..*", "ModelOpt"),
    )
)
_PACKED = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32)
_INTEGERS = (*_PACKED, torch.int64, torch.uint64)
# Last parts of names under which packed numbers are a weight, and what programs call them so.
_CODES = {
    "B": "Marlin",
    "weight": "weights of integers", "qweight": "GPTQ or AWQ", "W_q": "HQQ", "Qidxs": "QuIP#", "q_weight": "EXL2",
    "embedding_quantized": "Gemma", "int_data": "torchao", "qdata": "torchao",
}  # fmt: skip
# The same where a scale or a table lies beside, for words that have other uses as well.
_CODES_BESIDE = {
    "codes": "AQLM or bitfold", "blocks": "MXFP4", "trellis": "EXL3 or QTIP", "indices": "VPTQ",
    "compressed": "compressed-tensors", "bitmask": "compressed-tensors", "data": "quanto", "packed": "packed codes",
}  # fmt: skip
_BESIDE = ("scale", "codebook", "centroids", "absmax", "suh", "SU", "table")
_NARROW = {
    torch.float8_e4m3fn: "FP8", torch.float8_e5m2: "FP8", torch.float8_e4m3fnuz: "FP8", torch.float8_e5m2fnuz: "FP8",
    torch.float8_e8m0fnu: "scales of type F8_E8M0",
}  # fmt: skip


def foreign_quantization(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], folder: Path | None = None
) -> str | None:
    """How a checkpoint that bitfold did not write is quantized, in a few words; None: it is not.

    Args:
        config: its config.json.
        tensors: all its tensors, from the headers.
        folder: where ModelOpt's own hf_quant_config.json may lie.

    Returns: the `quant_method` where a config names one, else what its tensors look like, with the first of them.
    """
    return next(_declared(config), None) or _model_opt(folder) or next(_evidence(tensors), None)


def refuse_foreign(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], folder: Path) -> None:
    """CheckpointError that says how another program quantized the checkpoint, if one did."""
    if found := foreign_quantization(config, tensors, folder):
        raise CheckpointError(f"is quantized already: {found}", where=str(folder), hint=HINT)


def _declared(config: Mapping[str, Any], depth: int = 0) -> Iterator[str]:
    """What a config says, in itself or in the configs of its parts (`text_config`)."""
    for key in _CONFIGS:
        if not (said := config.get(key)):
            continue
        method = said.get("quant_method") or said.get("quant_algo") if isinstance(said, dict) else said
        yield f"{str(method)[:40]}, by its {key}" if method else f"it has a {key}"
    mlx = config.get("quantization")
    if isinstance(mlx, dict) and "bits" in mlx:
        yield f"MLX, {str(mlx['bits'])[:40]} bits"
    if depth < 4:
        for part in config.values():
            if isinstance(part, dict):
                yield from _declared(part, depth + 1)


def model_opt_settings(folder: Path) -> dict[str, Any]:
    """What ModelOpt says in a file of its own, with its name as the `quant_method`; empty without such a file."""
    file = folder / _MODEL_OPT
    said = read_json_object(file).get("quantization") if file.is_file() else None
    return {"quant_method": "modelopt", **said} if isinstance(said, dict) and said.get("quant_algo") else {}


def _model_opt(folder: Path | None) -> str | None:
    algorithm = None if folder is None else model_opt_settings(folder).get("quant_algo")
    return f"{str(algorithm)[:40]} (ModelOpt), by its {_MODEL_OPT}" if algorithm else None


def _evidence(tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    """What tensors look like when the config says nothing: names first, they tell more than dtypes."""
    for pattern, method in _TELLING:
        yield from (f"{method}, by its tensor {name}" for name in tensors if pattern.search(name))
    parts = (_split(name.removesuffix(".weight")) for name in tensors)
    scaled = {before for before, word in parts if word.startswith(_BESIDE)}
    for name, info in tensors.items():
        if look := _codes(name, info, scaled) or _scaled(name, tensors):
            yield f"{look}, by its tensor {name}"
    for name, info in tensors.items():
        if isinstance(info, ForeignInfo):
            yield f"tensors of type {info.label}, by its tensor {name}"
        elif info.dtype in _NARROW:
            yield f"{_NARROW[info.dtype]}, by its tensor {name}"


def _codes(name: str, info: TensorInfo, scaled: Set[str]) -> str | None:
    """The method of a tensor that holds packed numbers where a weight would be."""
    if isinstance(info, ForeignInfo) or info.dtype not in _INTEGERS:
        return None
    before, word = _split(name)
    last = re.split("[.:]", name)[-1]
    if last in _CODES and (info.dtype in _PACKED or len(info.shape) > 1):
        return "MLX" if info.dtype == torch.uint32 and before in scaled else _CODES[last]
    return _CODES_BESIDE.get(word) if info.dtype in _PACKED and before in scaled else None


def _scaled(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The method of a scale that has a weight of its name beside it: `X_scale_inv` of X, `weight_scale` of `weight`."""
    if name.endswith("_scale_inv") and name.removesuffix("_scale_inv") in tensors:
        return "FP8 with block scales"
    own = re.fullmatch(r"(.*\bweight)_scales?", name)
    return "weights with scales" if own and own[1] in tensors else None


def _split(name: str) -> tuple[str, str]:
    """The last word of a name, and what is before it: `experts.down_proj_` and `blocks`."""
    word = re.split("[.:_]", name)[-1]
    return name[: len(name) - len(word)], word
