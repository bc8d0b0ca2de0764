"""Errors of single layers against their definitions; records of what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tiny_lm
from bitfold.checkpoints.bitfold_folder import QuantizedSource
from bitfold.errors import CheckpointError, ModelError, UsageError
from bitfold.evaluation.layers import layer_errors
from bitfold.records.record import FILE, add_to_record, read_record, write_record
from bitfold.run.driver import quantize

UP = "model.layers.1.mlp.up_proj.weight"
SIZES = {"context": 32, "max_tokens": 96, "swap_tokens": 64}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm.folder(tmp_path_factory.mktemp("layers") / "original", tiny_lm.model())


@pytest.fixture(scope="module")
def quantized(original: Path) -> Path:
    quantize(original, original.parent / "q", bits=3, group_size=16, transform="hadamard", keep_embeddings=True)
    return original.parent / "q"


def test_the_three_errors_by_definition(original: Path, quantized: Path) -> None:
    """Straight from the formulas, in float64, for one tensor in the middle of the model."""
    result = layer_errors(quantized, original, tiny_lm.TEXT, swaps=-1, **SIZES)
    found = {e.tensor: e for e in result.layers}
    assert len(found) == 14
    model = tiny_lm.model().double()
    layer = model.get_submodule(UP.removesuffix(".weight"))
    w, changed = layer.weight.detach().clone(), QuantizedSource(quantized).read(UP).double()
    ids = torch.tensor(tiny_lm.tokenizer()(tiny_lm.TEXT)["input_ids"])[:96].view(3, 32)
    inputs: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].reshape(-1, 64)))
    with torch.no_grad():
        before = model(input_ids=ids[:2]).logits[:, :-1].log_softmax(-1)
        model(input_ids=ids)
        handle.remove()
        layer.weight.copy_(changed)
        after = model(input_ids=ids[:2]).logits[:, :-1].log_softmax(-1)
    x = inputs[1]
    error = found[UP]
    assert error.weight_error == pytest.approx(((w - changed).square().sum() / w.square().sum()).item(), rel=1e-5)
    outputs = (x @ (w - changed).T).square().sum() / (x @ w.T).square().sum()
    assert error.output_error == pytest.approx(outputs.item(), rel=1e-4)
    assert error.swap_kl == pytest.approx((before.exp() * (before - after)).sum(-1).mean().item(), rel=1e-3)
    assert error.swap_kl > 1e-4
    assert (result.tokens, result.swap_tokens) == (96, 62)


def test_the_model_is_put_back_and_swaps_are_spread(original: Path, quantized: Path) -> None:
    model = tiny_lm.model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    options = {"tokenizer": tiny_lm.tokenizer(), **SIZES}
    result = layer_errors(quantized, model, tiny_lm.TEXT, swaps=3, **options)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    swapped = [i for i, e in enumerate(result.layers) if e.swap_kl is not None]
    assert swapped == [2, 7, 11]
    none = layer_errors(quantized, model, tiny_lm.TEXT, **options)
    assert all(e.swap_kl is None for e in none.layers)
    json.dumps(none.to_dict(), allow_nan=False)


def test_refusals(original: Path, quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing that is quantized"):
        layer_errors(original, original, tiny_lm.TEXT)
    with pytest.raises(ModelError, match="unquantized original"):
        layer_errors(quantized, quantized, tiny_lm.TEXT, **SIZES)
    with pytest.raises(UsageError, match="cannot swap"):
        layer_errors(quantized, original, tiny_lm.TEXT, swaps=-2, **SIZES)
    with pytest.raises(UsageError, match="fewer than one window"):
        layer_errors(quantized, original, "short\n")


def test_records(original: Path, tmp_path: Path) -> None:
    report = quantize(original, tmp_path / "q", bits=4, method="rtn")
    write_record(tmp_path / "q", report, {"seed": 0})
    record = read_record(tmp_path / "q")
    assert record["quantize"]["source"] == "original"
    assert str(tmp_path) not in (tmp_path / "q" / FILE).read_text(encoding="utf-8")
    first = {"reference": "r", "text": "t", "context": 8, "tokens": 9, "kl_mean": 1.0}
    add_to_record(tmp_path / "q", "evaluations", first)
    add_to_record(tmp_path / "q", "evaluations", {**first, "context": 16})
    add_to_record(tmp_path / "q", "evaluations", {**first, "kl_mean": 2.0})
    kept = read_record(tmp_path / "q")["evaluations"]
    assert [(e["context"], e["kl_mean"]) for e in kept] == [(16, 1.0), (8, 2.0)]
    assert read_record(tmp_path) == {}
    with pytest.raises(CheckpointError, match="no model folder"):
        add_to_record(tmp_path, "layers", {})
    (tmp_path / "q" / FILE).write_text("[", encoding="utf-8")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        read_record(tmp_path / "q")
