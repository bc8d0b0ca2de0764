"""`quantize_` under adapters of PEFT: the layers of the model are quantized, what is trained is left as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf

pytest.importorskip("peft")
import peft

import bitfold
from bitfold.nn import QLinear

Q = ["q_proj", "v_proj"]
KINDS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=8, target_modules=Q),
    "lora with bias": lambda: peft.LoraConfig(r=8, target_modules=Q, lora_bias=True),
    "dora": lambda: peft.LoraConfig(r=8, target_modules=Q, use_dora=True),
    "embedding": lambda: peft.LoraConfig(r=8, target_modules=["embed_tokens", "q_proj"]),
    "all-linear": lambda: peft.LoraConfig(r=8, target_modules="all-linear"),
    "modules_to_save": lambda: peft.LoraConfig(r=8, target_modules=Q, modules_to_save=["lm_head", "embed_tokens"]),
    "ia3": lambda: peft.IA3Config(target_modules=[*Q, "down_proj"], feedforward_modules=["down_proj"]),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=["q_proj"]),
    "loha": lambda: peft.LoHaConfig(r=8, target_modules=Q),
    "lokr": lambda: peft.LoKrConfig(r=8, target_modules=Q),
    "adalora": lambda: peft.AdaLoraConfig(r=8, target_modules=Q, total_step=10),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=Q),
    "fourier": lambda: peft.FourierFTConfig(n_frequency=10, target_modules=Q),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, target_modules=Q),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"]),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", encoder_hidden_size=32),
}


def adapted(kind: str) -> Any:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return peft.get_peft_model(hf.LlamaForCausalLM(config), KINDS[kind]())


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("inner", [False, True], ids=["whole", "base model"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_left_alone(kind: str, inner: bool) -> None:
    model, ids = adapted(kind).eval(), {"input_ids": torch.arange(9)[None]}
    with torch.no_grad():
        wanted = model(**ids).logits
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    done = bitfold.quantize_(model.get_base_model() if inner else model, "int8")
    assert len([o for o in done if o.format is not None]) == 7
    assert not any("lm_head" in o.tensor or "embed" in o.tensor for o in done if o.format is not None)
    after = trained(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in after.items())
    assert sum(isinstance(m, QLinear) for m in model.modules()) == 7
    with torch.no_grad():
        assert (model(**ids).logits - wanted).norm() <= 0.1 * wanted.norm()
    model(**ids).logits.square().mean().backward()
    assert any(p.grad is not None for p in after.values())


def test_several_adapters() -> None:
    """Short rows of adapters that a group size does not divide are no obstacle either."""
    model = adapted("lora")
    model.add_adapter("second", KINDS["lora"]())
    before = {name for name, _ in model.named_parameters() if "lora_" in name}
    done = bitfold.quantize_(model, "int4-asym-g32")
    assert not any("lora_" in o.tensor for o in done)
    assert {name for name, _ in model.named_parameters() if "lora_" in name} == before
