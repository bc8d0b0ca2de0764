"""LoRA on quantized layers: gradients, memory, adapters that come back, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny_lm
from bitfold.errors import UsageError
from bitfold.integrations.peft import QLoraLinear
from bitfold.methods.quantize import quantize_tensor
from bitfold.models.swap import quantize_
from bitfold.nn import QLinear
from bitfold.recipes.recipe import Recipe
from bitfold.transforms import Hadamard
from numerics import check_same_answers, check_same_tensors

peft = pytest.importorskip("peft")

BASES = {
    "nf4-dq": Recipe.of("nf4-g32-dq"),
    "int4": Recipe.of("int4-asym-g32"),
    "w8a8": Recipe.of("int8", act="int8-mixed:6.0"),
    "trellis": Recipe.of("trellis-3", transform="hadamard"),
    "e8p": Recipe.of("e8p", transform="hadamard"),
}
bases = pytest.mark.parametrize("recipe", BASES.values(), ids=BASES.keys())
IDS = torch.tensor([list(tiny_lm.TEXT.encode()[:48]), list(tiny_lm.TEXT.encode()[48:96])])


def base(recipe: Recipe) -> Any:
    """A quantized language model."""
    model: Any = tiny_lm.model()
    quantize_(model, recipe)
    return model


def with_adapters(model: Any, **options: Any) -> Any:
    """The model with rank-4 adapters on every linear layer, seeded."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})
    return peft.get_peft_model(model, config)


def train(model: Any, steps: int) -> list[float]:
    """The losses of a few steps of Adam."""
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


@bases
def test_every_linear_layer_gets_an_adapter_and_learns(recipe: Recipe) -> None:
    """Seven in each of two blocks; nothing changes before training; only adapters move, and the loss falls."""
    quantized = base(recipe)
    expected = quantized(IDS).logits
    model = with_adapters(quantized)
    assert sum(isinstance(m, QLoraLinear) for m in model.modules()) == 14
    check_same_answers(model(IDS).logits, expected)
    fields = {name: b.clone() for name, b in model.named_buffers()}
    losses = train(model, 8)
    assert losses[-1] < losses[0] - 0.3
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert all(torch.equal(b, fields[name]) for name, b in model.named_buffers())


@bases
def test_gradients_are_those_of_the_dequantized_model(recipe: Recipe) -> None:
    """To rounding. With int8 activations the products differ, so that only their direction can be compared."""
    model = with_adapters(base(recipe), init_lora_weights=False)
    plain = copy.deepcopy(model)
    for module in plain.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, QLinear):
                linear = nn.Linear(child.in_features, child.out_features, bias=False)
                linear.weight = nn.Parameter(child.weight.dequantize(), requires_grad=False)
                setattr(module, name, linear)
    for m in (model, plain):
        m(IDS, labels=IDS).loss.backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    expected = torch.cat([p.grad.flatten() for p in plain.parameters() if p.requires_grad])
    tolerance = 0.1 if recipe.rules[0].act != "float" else 2e-4
    assert (found - expected).norm() < tolerance * expected.norm()


@bases
def test_adapters_come_back(recipe: Recipe, tmp_path: Path) -> None:
    """Saved in PEFT's format, put on a fresh base: the same model."""
    model = with_adapters(base(recipe))
    train(model, 2)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    again = peft.PeftModel.from_pretrained(base(recipe), tmp_path)
    check_same_tensors(again, model.eval())
    check_same_answers(again(IDS).logits, model(IDS).logits)
    assert isinstance(again.unload().model.layers[0].mlp.up_proj, QLinear)


@pytest.mark.parametrize("name", ["nf4-dq", "int3-g64", "trellis-3", "e8p", "fp8-e4m3"])
@pytest.mark.parametrize("transform", [None, Hadamard(512, 1)], ids=["plain", "rotated"])
def test_nothing_dequantized_is_kept(name: str, transform: Hadamard | None) -> None:
    """What autograd keeps of a frozen layer is the packed weight, not a float copy of it."""
    w = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    layer = QLinear(quantize_tensor(w, name), transform=transform)
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    x = torch.randn(4, 512, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = layer(x)
    assert sum(kept.values()) < 1.2 * layer.weight.qtensor.nbytes + 64 * 1024  # 1 MB in float32
    y.sum().backward()
    assert x.grad is not None


def test_what_is_refused() -> None:
    """Merging, and adapters that need the weight itself."""
    model = with_adapters(base(BASES["int4"]))
    with pytest.raises(UsageError, match="merged"):
        model.merge_and_unload()
    for options in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(UsageError):
            with_adapters(base(BASES["int4"]), **options)


def test_adapters_by_name_and_twice() -> None:
    """Named modules only; a second adapter on the same layers."""
    model = with_adapters(base(BASES["nf4-dq"]), target_modules=["q_proj", "v_proj"])
    assert sum(isinstance(m, QLoraLinear) for m in model.modules()) == 4
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("second")
    assert train(model, 2)[0] > 0
    plain = with_adapters(tiny_lm.model())
    assert not any(isinstance(m, QLoraLinear) for m in plain.modules())
