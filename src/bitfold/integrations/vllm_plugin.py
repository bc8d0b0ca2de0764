"""The entry point of vLLM's plug-ins: bitfold's own folders in vLLM, as one more quantization method.

vLLM calls `register` in every process that it starts, and may do so more than once.
"""

from __future__ import annotations

from bitfold.checkpoints.schema import QUANT_METHOD


def register() -> None:
    """Make vLLM know `quant_method: bitfold`; harmless when done twice."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if QUANT_METHOD in QUANTIZATION_METHODS:
        return
    from bitfold.integrations.vllm import BitfoldConfig

    register_quantization_config(QUANT_METHOD)(BitfoldConfig)
