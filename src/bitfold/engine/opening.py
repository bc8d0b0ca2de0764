"""A model opened to write: bare where the engine knows all that its config says, else as transformers builds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bitfold.engine import bare
from bitfold.models.load import load_folder, load_packed, load_plain
from bitfold.models.model_ref import ModelRef, is_bitfold
from bitfold.system.backend import CPU

_CAUSAL, _ANSWERING = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"


@dataclass(frozen=True)
class Opened:
    """A model with what a text needs.

    Args:
        model: in evaluation mode; bare, or of transformers.
        tokenizer: of transformers, or a `PlainTokenizer`.
        longest: tokens that the model can attend to, or None.
        whole: loads transformers' model in place of a bare one that the engine cannot run.
    """

    model: nn.Module
    tokenizer: Any
    longest: int | None
    whole: Callable[[], nn.Module]


def open_model(
    ref: ModelRef,
    dtype: torch.dtype | None,
    *,
    tokenizer: Any = None,
    check: Callable[[Any, int | None], None] = lambda tokenizer, longest: None,
    require: Callable[[ModelRef], None] = lambda ref: None,
    device: torch.device = CPU,
) -> Opened:
    """Load a model to write with.

    Args:
        ref: the model.
        dtype: of what is not quantized; None: as stored.
        tokenizer: in place of its own.
        check: looks at the tokenizer and at the longest text before minutes of loading.
        require: refuses a model that is of another kind.
        device: where it runs; the engine, and so a bare model, on the CPU only.

    Raises:
        ModelError, CheckpointError: it cannot be loaded, or is refused.
    """
    empty = empty_model(ref, dtype) if device.type == "cpu" else None
    if empty is None:
        require(ref)
    tokenizer = ref.tokenizer(plain=empty is not None) if tokenizer is None else tokenizer
    longest = ref.longest if empty is None else int(empty.config.max_position_embeddings)
    check(tokenizer, longest)

    def whole() -> nn.Module:
        return ref.load(_ANSWERING if ref.encodes_first() else _CAUSAL, dtype, device=device)

    return Opened(whole() if empty is None else fill(empty, ref, dtype), tokenizer, longest, whole)


def load_model(ref: ModelRef, dtype: torch.dtype | None) -> nn.Module:
    """A causal language model for the engine alone. Errors as `open_model`."""
    empty = empty_model(ref, dtype)
    return ref.load(_CAUSAL, dtype) if empty is None else fill(empty, ref, dtype)


def empty_model(ref: ModelRef, dtype: torch.dtype | None) -> Any:
    """The bare model of a checkpoint without its weights; None where transformers must build it."""
    model = None if ref.path is None else bare.build(ref.config, dtype or _stored_dtype(ref))
    if model is None:
        return None
    names = set(ref.source().names())
    if is_bitfold(ref.config):
        names -= set((ref.config["quantization_config"] or {}).get("unused", ()))
    return model if bare.matches(model, names) else None


def _stored_dtype(ref: ModelRef) -> torch.dtype | None:
    """That of the first float tensor, where the config names none and nothing is packed."""
    if is_bitfold(ref.config) or ref.packed or ref.config.get("dtype") or ref.config.get("torch_dtype"):
        return None
    source = ref.source()
    return next((d for d in (source.info(name).dtype for name in source.names()) if d.is_floating_point), None)


def fill(model: Any, ref: ModelRef, dtype: torch.dtype | None) -> nn.Module:
    """Give an empty bare model its weights and its generation config, and close the checkpoint."""
    assert ref.path is not None
    settings = ref.source().generation_config
    try:
        if is_bitfold(ref.config):
            load_folder(ref.path, module=model, dtype=dtype)
        else:
            (load_packed if ref.packed else load_plain)(ref.source(), dtype, model)
        bare.give_generation(model, settings, ref.name)
    finally:
        ref.close()
    found: nn.Module = model
    return found


def held_bytes(model: nn.Module) -> int:
    """Memory of the weights, each counted once."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())
