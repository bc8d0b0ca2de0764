"""Training through rounding: gradients, what is written, every format; teachers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bitfold
import tiny_lm
from bitfold.errors import BitfoldError, UsageError
from bitfold.formats import FORMATS
from bitfold.methods.quantize import quantize_tensor
from bitfold.nn import QLinear
from bitfold.recipes.recipe import Recipe, Rule

IDS = torch.tensor([tiny_lm.tokenizer()(tiny_lm.TEXT)["input_ids"][:96]]).reshape(2, 48)


def trainable() -> list[str]:
    """Formats that rounding to nearest makes."""
    found = []
    for name, format in FORMATS.items():
        if not format.plain:
            try:
                quantize_tensor(torch.ones(16, 256), name)
            except BitfoldError:
                continue
            found.append(name)
    return found


def layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 16))


def close(a: torch.Tensor, b: torch.Tensor, share: float = 1e-3) -> bool:
    return float((a - b).abs().max()) <= share * float(b.abs().max())


def test_next_to_all_formats_can_be_trained() -> None:
    assert {"ternary", "int2-g64", "trellis-2", "e8p", "nf4-dq", "mxfp4", "q4_k"} <= set(trainable())


@pytest.mark.parametrize("name", trainable())
def test_gradients_flow_and_what_is_written_is_what_was_trained(name: str) -> None:
    """A law over all formats: the forward pass multiplies with rounded weights, the gradient is that of the plain
    layer there, it changes when the weight does, and the converted layer answers the same."""
    model = layer()
    plain = copy.deepcopy(model)
    prepared = bitfold.prepare_qat(model, Recipe.of(name))
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain[0].weight.copy_(quantize_tensor(plain[0].weight, name, fit="mse").dequantize())
    answers = [m(x) for m in (prepared, plain)]
    assert close(*answers)
    for answer in answers:
        answer.square().sum().backward()
    weight = prepared[0].parametrizations.weight.original
    assert close(weight.grad, plain[0].weight.grad)
    assert close(prepared[0].bias.grad, plain[0].bias.grad)
    with torch.no_grad():
        weight.sub_(0.5 * weight.grad / weight.grad.abs().max())
    trained = prepared.eval()(x)
    assert not torch.equal(trained, answers[0])
    converted = bitfold.convert_qat(prepared)
    assert isinstance(converted[0], QLinear)
    assert close(converted(x), trained, 2e-2 if FORMATS[name].bits > 7 else 1e-2)


@pytest.mark.parametrize(
    ("format", "options"),
    [("ternary", {}), ("int2-g32", {"act": "int8"}), ("trellis-2", {"transform": "hadamard"})],
)
def test_a_model_ends_at_a_folder(format: str, options: dict[str, str], tmp_path: Path) -> None:
    """Trained on a teacher it comes nearer to it, and the folder predicts what the prepared model does."""
    teacher, model = tiny_lm.model(), tiny_lm.model()
    bitfold.prepare_qat(model, Recipe.of(format, **options), every=4)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 2e-3)
    losses = []
    for _ in range(24):
        loss = bitfold.kl_loss(model(IDS).logits, teacher(IDS).logits)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        prepared = model.eval()(IDS).logits
    bitfold.convert_qat(model, tmp_path / "out", tokenizer=tiny_lm.tokenizer())
    loaded = bitfold.load(tmp_path / "out")
    assert isinstance(loaded.model.layers[0].mlp.up_proj, QLinear)
    with torch.no_grad():
        assert close(loaded(IDS).logits, prepared, 2e-2)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_from_packed_weights(tmp_path: Path) -> None:
    """What was calibrated is trained on: formats stay, and it begins near what was loaded."""
    source = tiny_lm.folder(tmp_path / "source", tiny_lm.model())
    bitfold.quantize(source, tmp_path / "q", format="int3-g32")
    model = bitfold.load(tmp_path / "q", dtype=torch.float32)
    with torch.no_grad():
        before = model(IDS).logits
    bitfold.prepare_qat(model)
    assert close(model(IDS).logits, before, 0.1)
    model(IDS, labels=IDS).loss.backward()
    assert model.model.layers[0].mlp.up_proj.parametrizations.weight.original.grad is not None
    bitfold.convert_qat(model, tmp_path / "out")
    assert bitfold.load(tmp_path / "out").model.layers[1].self_attn.q_proj.weight.format.name == "int3-g32"


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model: Any = tiny_lm.model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    bitfold.prepare_qat(model, Recipe((Rule("model.embed_tokens", "int8"), Rule("*", "int4-g32"))))
    model(IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        expected = model.eval()(IDS).logits
    bitfold.convert_qat(model, tmp_path / "out")
    with torch.no_grad():
        assert close(bitfold.load(tmp_path / "out")(IDS).logits, expected, 2e-2)


def test_rounded_anew_when_it_should_be() -> None:
    """In training after so many changes, in evaluation whenever it changed."""
    model: Any = bitfold.prepare_qat(layer(), "int2-g64", every=3)
    weight, rounding = model[0].parametrizations.weight.original, model[0].parametrizations.weight[0]
    count: list[int] = []
    code = rounding.code
    rounding.code = lambda w: (count.append(1), code(w))[1]
    x = torch.randn(2, 256)
    model.train()
    for _ in range(6):
        model(x), model(x)
        with torch.no_grad():
            weight.mul_(1.1)
    assert len(count) == 2
    model.eval()
    model(x), model(x)
    assert len(count) == 3


def test_the_loss_of_a_teacher() -> None:
    """Against the divergence in float64, with and without tokens that do not count."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(2, 3, 20, generator=generator) for _ in range(2))
    p, q = (torch.softmax(x.double() / 2, -1) for x in (teacher, logits))
    kl = 4 * (p * (p / q).log()).sum(-1)
    assert abs(float(bitfold.kl_loss(logits, teacher, temperature=2.0)) - float(kl.mean())) < 1e-5
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert abs(float(bitfold.kl_loss(logits, teacher, mask, 2.0)) - float(kl[mask > 0].mean())) < 1e-5
    with pytest.raises(UsageError, match="predicts"):
        bitfold.kl_loss(logits, teacher[..., :5])


def test_what_is_refused() -> None:
    for recipe in (
        Recipe.of("int4-g64", method="gptq"),
        Recipe.of("int8", act="int8-mixed:6.0"),
        Recipe.of("int4-g64", transform="awq"),
    ):
        with pytest.raises(UsageError):
            bitfold.prepare_qat(layer(), recipe)
    with pytest.raises(UsageError, match="no layers"):
        bitfold.prepare_qat(layer())
    with pytest.raises(UsageError, match="not prepared"):
        bitfold.convert_qat(layer())
    with pytest.raises(UsageError, match="every"):
        bitfold.prepare_qat(layer(), "int8", every=0)


def test_through_the_trainer(tmp_path: Path) -> None:
    """transformers' own loop, with a teacher."""
    pytest.importorskip("accelerate")
    import transformers

    from bitfold.integrations.trainer import KlTrainer

    teacher, model = tiny_lm.model(), tiny_lm.model()
    bitfold.prepare_qat(model, "int2-g32")
    rows = [
        {"input_ids": IDS[i % 2], "attention_mask": torch.ones(48, dtype=torch.int64), "labels": IDS[i % 2]}
        for i in range(24)
    ]
    options = transformers.TrainingArguments(
        str(tmp_path / "run"), per_device_train_batch_size=2, num_train_epochs=2, learning_rate=2e-3, logging_steps=1,
        report_to=[], use_cpu=True, save_strategy="epoch", disable_tqdm=True,
    )  # fmt: skip
    trainer = KlTrainer(model, options, train_dataset=rows, teacher=teacher)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    bitfold.convert_qat(model, tmp_path / "out")
    assert isinstance(bitfold.load(tmp_path / "out").model.layers[0].mlp.up_proj, QLinear)
