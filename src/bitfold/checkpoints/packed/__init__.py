"""Weights that other programs packed: who is read, and how a folder becomes a `Source`.

Another program is one file with a function like `read_gptq`, and a line in `READERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bitfold.checkpoints.foreign import model_opt_settings, refuse_foreign
from bitfold.checkpoints.packed.awq import read_awq
from bitfold.checkpoints.packed.base import Packed, Stored
from bitfold.checkpoints.packed.bitsandbytes import read_bitsandbytes
from bitfold.checkpoints.packed.compressed import read_compressed
from bitfold.checkpoints.packed.floats import read_fp8, read_model_opt, read_mxfp4
from bitfold.checkpoints.packed.gptq import read_auto_round, read_gptq
from bitfold.checkpoints.packed.hqq import read_hqq
from bitfold.checkpoints.packed.mlx import read_mlx
from bitfold.checkpoints.packed.source import PackedSource
from bitfold.checkpoints.safetensors import SafetensorsSource

__all__ = ["READERS", "PackedSource", "open_packed"]

Reader = Callable[[Stored], dict[str, Packed]]
# By the `quant_method` of a config, in small letters.
READERS: dict[str, Reader] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "auto-round": read_auto_round,
    "compressed-tensors": read_compressed,
    "fp8": read_fp8,
    "modelopt": read_model_opt,
    "mxfp4": read_mxfp4,
    "bitsandbytes": read_bitsandbytes,
    "hqq": read_hqq,
    "mlx": read_mlx,
}
# Families of Conv1D: programs pack (outputs, inputs) of them, the model has it the other way round.
_TURNED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONFIGS = ("quantization_config", "compression_config")


def open_packed(source: SafetensorsSource) -> PackedSource | None:
    """A folder that a program among `READERS` packed; None: no config says so, or there is nothing of the kind in it.

    Raises:
        CheckpointError: written in a way that the reader does not cover, or damaged.
    """
    settings, config = _settings(source.config)
    settings = settings or model_opt_settings(source.path)
    method = str(settings.get("quant_method", "")).lower()
    if method not in READERS:
        return None
    infos = {name: source.info(name) for name in source.names()}
    stored = Stored(method, settings, config, infos, source.read, str(source.path))
    if config.get("model_type") in _TURNED:
        stored.refuse(f"of the family {config['model_type']}, whose layers it turns around")
    weights = READERS[method](stored)
    if not weights:
        return None
    used = {part for packed in weights.values() for part in packed.parts.values()}
    opened = PackedSource(source, method, weights, config)
    left = {name: info for name, info in infos.items() if name not in used and name not in opened.folded()}
    refuse_foreign({}, left, source.path)  # what the reader did not find a meaning for is not read as if it were plain
    return opened


def _settings(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a config says of quantization, in itself or in the part for text; and the config without it."""
    rest = dict(config)
    mlx = rest.get("quantization")
    found = {"quant_method": "mlx", **mlx} if isinstance(mlx, dict) and "bits" in mlx else {}
    if found:
        del rest["quantization"]
    for key in _CONFIGS:
        said = rest.pop(key, None)
        if isinstance(said, dict) and not found:
            usual = {"quant_method": "compressed-tensors"} if "config_groups" in said else {}
            found = {**usual, **said}
    text = rest.get("text_config")
    if isinstance(text, dict):
        inner, plain = _settings({key: value for key, value in text.items() if key != "text_config"})
        found, rest["text_config"] = found or inner, {**text, **plain} if not inner else plain
    return found, rest
