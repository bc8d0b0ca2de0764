"""Outliers that were planted are found where they are; kurtosis and maxima by their definitions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import tiny_lm
from bitfold.errors import ModelError, UsageError
from bitfold.evaluation import evaluate
from bitfold.evaluation.outliers import find_outliers
from bitfold.models.swap import quantize_
from bitfold.transforms import Hadamard

OPTIONS = {"context": 32, "max_tokens": 96, "tokenizer": tiny_lm.tokenizer()}
TEXT = tiny_lm.TEXT


def planted() -> nn.Module:
    """Dimension 5 enters attention sixty times too large in both blocks, dimension 9 in the first block only."""
    model = tiny_lm.model()
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):  # type: ignore[union-attr, arg-type]
            layer.input_layernorm.weight[5] = 60.0
            layer.post_attention_layernorm.weight[5] = 60.0
            layer.input_layernorm.weight[9] = 60.0 if i == 0 else 1.0
    return model


def inputs_of(model: nn.Module, path: str) -> torch.Tensor:
    ids = torch.tensor(tiny_lm.tokenizer()(TEXT)["input_ids"])[:96].view(3, 32)
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for window in ids:
            model(input_ids=window[None])
    handle.remove()
    return torch.cat(seen).double()


def test_planted_features_are_found() -> None:
    model = planted()
    found = find_outliers(model, TEXT, **OPTIONS)
    states = [
        inputs_of(model, f"model.layers.{i}.{p}") for i in range(2) for p in ("self_attn.q_proj", "mlp.gate_proj")
    ]
    over = torch.stack([x.abs() >= 6 for x in states])
    by_dimension = {f.dimension: f for f in found.features}
    assert set(by_dimension) == set(over.any(1).any(0).nonzero().flatten().tolist())
    assert by_dimension[5].layers == 1.0
    assert by_dimension[5].systematic
    assert by_dimension[9].layers == 0.25
    for j, f in by_dimension.items():
        assert f.positions == pytest.approx(over.any(0)[:, j].double().mean().item())
        assert f.largest == pytest.approx(max(x[:, j].abs().max().item() for x in states), rel=1e-5)
    assert found.systematic == 2
    assert found.layers_affected == 1.0
    assert found.hidden == 64
    json.dumps(found.to_dict(), allow_nan=False)


def test_an_ordinary_model_has_none() -> None:
    found = find_outliers(tiny_lm.model(), TEXT, **OPTIONS)
    assert found.systematic == 0
    assert found.positions_affected == 0


def test_numbers_of_a_layer_by_definition() -> None:
    model = planted()
    found = find_outliers(model, TEXT, **OPTIONS)
    (inputs,) = [i for i in found.inputs if "model.layers.1.mlp.gate_proj" in i.layers]
    assert inputs.layers == ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
    x = inputs_of(model, inputs.layers[0])
    w = torch.stack([model.get_parameter(f"{layer}.weight").double().abs() for layer in inputs.layers])
    scale = (x.abs().amax(0) / w.amax((0, 1))).sqrt()
    for basis, y in (("none", x), ("hadamard", Hadamard(64, 0)(x)), ("smooth", x / scale)):
        centred = y - y.mean()
        kurtosis = centred.pow(4).mean() / centred.pow(2).mean() ** 2
        assert inputs.kurtosis[basis] == pytest.approx(kurtosis.item(), rel=1e-4)
        assert inputs.largest[basis] == pytest.approx(y.abs().max().item(), rel=1e-4)
        assert inputs.ratio[basis] == pytest.approx((y.abs().max() / y.abs().median()).item(), rel=1e-2)
    assert inputs.beyond == int((x.abs().amax(0) >= 6).sum())
    assert inputs.ratio["none"] > 2 * inputs.ratio["hadamard"]  # what the rotation is for
    assert inputs.ratio["none"] > 2 * inputs.ratio["smooth"]
    (spikes,) = [w for w in found.weights if w.tensor == "model.layers.1.mlp.up_proj.weight"]
    up = model.get_parameter(spikes.tensor).double()
    assert spikes.ratio["none"] == pytest.approx((up.abs().max() / up.abs().median()).item(), rel=1e-3)


def test_perplexity_parameters_and_quantized_models(tmp_path: Path) -> None:
    model = tiny_lm.model()
    found = find_outliers(model, TEXT, **OPTIONS)
    assert found.perplexity == pytest.approx(evaluate(model, None, TEXT, **OPTIONS).perplexity, rel=1e-5)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    before = found.inputs[0]
    quantize_(model, "int8")
    again = find_outliers(model, TEXT, **OPTIONS)
    assert again.parameters == found.parameters
    assert again.inputs[0].layers == before.layers
    assert again.inputs[0].kurtosis["none"] == pytest.approx(before.kurtosis["none"], rel=1e-3)


def test_refusals(tmp_path: Path) -> None:
    encoder = tiny_lm.folder(tmp_path / "bert", tiny_lm.encoder())
    with pytest.raises(ModelError, match="does not predict the next token"):
        find_outliers(encoder, TEXT)
    with pytest.raises(UsageError, match="fewer than one window"):
        find_outliers(tiny_lm.model(), "short\n", **OPTIONS)
