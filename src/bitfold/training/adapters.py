"""LoRA adapters of PEFT on a quantized model (Hu et al. 2021, arXiv 2106.09685; Dettmers et al. 2023, 2305.14314).

They may start from what rounding lost, the first singular values of W - Q, as LoftQ does (Li et al. 2023, arXiv
2310.08659) with one alternation: the base stays as it is, and base and adapter together begin nearer the original.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitfold.errors import ModelError, UsageError
from bitfold.models.model_ref import ModelRef
from bitfold.training.options import Finetuning

NAME = "default"
_MORE = 8  # singular values that the randomised decomposition looks at beyond those wanted
_RIGHT = "is it the right original?"
_POWERS = 4  # of its power iteration


def require_peft() -> Any:
    """The library; UsageError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UsageError("adapters need the library `peft`", hint="pip install 'bitfold[finetune]'") from error
    return peft


def add_adapters(model: nn.Module, how: Finetuning, base: str) -> Any:
    """PEFT's model around this one, which is changed: trainable float32 adapters, B = 0.

    Args:
        model: with quantized layers.
        how: rank, alpha, targets, seed.
        base: what the adapter's config calls its base.

    Raises:
        UsageError: no layer has such a name.
    """
    peft = require_peft()
    targets: Any = how.targets[0] if how.targets == ("all-linear",) else list(how.targets)
    torch.manual_seed(how.seed)
    config = peft.LoraConfig(r=how.rank, lora_alpha=how.alpha, target_modules=targets, task_type="CAUSAL_LM")
    try:
        made = peft.get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(
            f"no adapters: {_line(error)}", where="--target", hint="all-linear, or q_proj, v_proj ..."
        ) from error
    made.peft_config[NAME].base_model_name_or_path = base
    made.peft_config[NAME].target_modules = sorted(made.peft_config[NAME].target_modules)  # a set is never twice alike
    for name, p in made.named_parameters():
        if p.requires_grad:
            p.data = p.data.float()
        assert not p.requires_grad or "lora_" in name, name
    return made.eval()


def trained(model: Any) -> dict[str, nn.Parameter]:
    """The adapters' matrices, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers that have an adapter, by their path in the model without adapters."""
    for path, module in model.named_modules():
        if hasattr(module, "lora_A") and NAME in module.lora_A:
            yield path, module


@torch.no_grad()
def start_from(model: nn.Module, original: ModelRef, seed: int) -> None:
    """Let every adapter begin with the first singular values of original - base.

    Args:
        model: with adapters, the one that was given to `add_adapters`.
        original: what the base was made from.
        seed: of the randomised decomposition.

    Raises:
        UsageError: its layers are not those of the base.
    """
    whole = original.load("AutoModelForCausalLM", torch.float32, decoded=True)
    torch.manual_seed(seed)
    for path, layer in adapted(model):
        base = layer.get_base_layer().weight
        packed = base.dequantize(torch.float32) if hasattr(base, "dequantize") else base.float()
        try:
            weight = whole.get_submodule(path).get_parameter("weight").float()
        except AttributeError as error:
            raise UsageError(f"it has no layer {path}", where=original.name, hint=_RIGHT) from error
        weight = weight.T if weight.shape != packed.shape else weight
        if weight.shape != packed.shape:
            what = f"{path} is {tuple(weight.shape)} there, {tuple(packed.shape)} in the base"
            raise UsageError(what, where=original.name, hint=_RIGHT)
        a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        u, s, v = torch.svd_lowrank(weight - packed, min(len(a) + _MORE, *packed.shape), _POWERS)
        rank = min(len(a), len(s))
        half = (s[:rank] / layer.scaling[NAME]).sqrt()
        a[:rank], b[:, :rank] = half[:, None] * v[:, :rank].T, u[:, :rank] * half
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise ModelError("NaN or infinity in the original or the base", where=path)


@torch.no_grad()
def save_adapter(model: Any, values: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the adapter in PEFT's format.

    Args:
        model: of `add_adapters`.
        values: its matrices.
        folder: an existing one.
    """
    for name, p in trained(model).items():
        p.copy_(values[name])
    model.save_pretrained(str(folder), save_embedding_layers=False)
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
