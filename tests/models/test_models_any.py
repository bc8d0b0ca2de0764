"""Any model: quantize in place, save, load, quantize the folder instead; all agree, and with the float model too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bitfold
from bitfold.nn import QWeight
from bitfold.recipes.recipe import Recipe, Rule
from model_zoo import ZOO, Case, outputs
from numerics import check_all_same_answers, check_same_tensors

# Rows of 8 bits, small groups that do not divide every row, a codebook with doubly quantized scales.
RECIPES = {
    "int8": Recipe.of("int8", fit="absmax"),
    "int4-asym-g24": Recipe.of("int4-asym-g24", fit="absmax"),
    "nf4-g32-dq": Recipe.of("nf4-g32-dq", fit="absmax"),
}

cases = pytest.mark.parametrize("case", ZOO.values(), ids=ZOO.keys())
saved_cases = pytest.mark.parametrize(
    "case", [c for c in ZOO.values() if c.saved], ids=[n for n, c in ZOO.items() if c.saved]
)
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


def weights_of(model: nn.Module) -> dict[str, QWeight]:
    """Quantized weights by the name of the tensor they replaced; every name, also of shared ones."""
    return {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, QWeight)}


def dequantized(case: Case, quantized: nn.Module) -> nn.Module:
    """The float model with the numbers that the quantized one stands for."""
    model = case.build()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in weights_of(quantized).items():
        values = weight.qtensor.dequantize()
        parameters[name].data = values.transpose(-1, -2).contiguous() if weight.stored_transposed else values
    return model


def check_close(found: list[torch.Tensor], model: nn.Module, case: Case) -> None:
    """Whether outputs differ from the exact ones by no more than rounding in float32 explains.

    The same model in float64 is the reference, and the error of the plain float32 model against it is the unit: another
    order of summation may cost as much again, at its worst point, with a factor of 8 for luck.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"  # the others have no float64
    plain = outputs(model, case.inputs())
    wide = {k: v.double() if v.is_floating_point() else v for k, v in case.inputs().items()}
    exact = outputs(model.double(), wide)
    assert len(found) == len(exact)
    for got, float32, reference in zip(found, plain, exact, strict=True):
        scale = reference.abs().max()
        unit = max((float32 - reference).abs().max().item(), (torch.finfo(torch.float32).eps * scale).item())
        assert (got - reference).abs().max().item() <= 8 * unit


def quantized(case: Case, recipe: Recipe) -> tuple[nn.Module, list[torch.Tensor]]:
    """The model quantized in place, and what it answers."""
    model = case.build()
    bitfold.quantize_(model, recipe)
    return model, outputs(model, case.inputs())


def check_same(loaded: nn.Module, model: nn.Module, expected: list[torch.Tensor], case: Case) -> None:
    """Whether a model is the other one: its tensors bit for bit, its answers but for the order of sums."""
    assert weights_of(loaded).keys() == weights_of(model).keys()
    check_same_tensors(loaded, model)
    check_all_same_answers(outputs(loaded, case.inputs()), expected)


@cases
@recipes
def test_quantized_in_place_equals_the_dequantized_float_model(case: Case, recipe: Recipe) -> None:
    model = case.build()
    names = set(model.state_dict())
    done = {o.tensor for o in bitfold.quantize_(model, recipe) if o.format is not None}
    assert len(done) == case.quantized
    assert done <= names
    assert not any("lm_head" in name or "router" in name or "embed" in name for name in done)
    check_close(outputs(model, case.inputs()), dequantized(case, model), case)


@cases
def test_save_and_load_change_nothing(case: Case, tmp_path: Path) -> None:
    """By bitfold.load, and by transformers' own from_pretrained."""
    model, expected = quantized(case, RECIPES["nf4-g32-dq"])
    bitfold.save(model, tmp_path / "out")
    check_same(bitfold.load(tmp_path / "out", module=None if case.saved else case.build()), model, expected, case)
    if case.saved:
        check_same(type(model).from_pretrained(tmp_path / "out"), model, expected, case)  # type: ignore[attr-defined]


@saved_cases
def test_the_folder_quantized_out_of_core_is_the_same_model(case: Case, tmp_path: Path) -> None:
    recipe = RECIPES["int4-asym-g24"]
    model, expected = quantized(case, recipe)
    case.build().save_pretrained(tmp_path / "src")  # type: ignore[operator]
    bitfold.quantize(tmp_path / "src", tmp_path / "out", recipe=recipe)
    check_same(bitfold.load(tmp_path / "out"), model, expected, case)
    check_same(type(model).from_pretrained(tmp_path / "out"), model, expected, case)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in ("llama", "gpt2", "mixtral", "gpt-oss", "whisper", "bert-classifier")]
    + [("llama", torch.float16), ("t5", torch.float16)],
)
def test_half_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = ZOO[name]
    model = case.build()
    for parameter in model.parameters():  # and not the rotary frequencies, which transformers keeps in float32
        parameter.data = parameter.data.to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.inputs().items()}
    bitfold.quantize_(model, RECIPES["int8"])
    expected = outputs(model, inputs)
    assert all(out.dtype == dtype and out.isfinite().all() for out in expected)
    bitfold.save(model, tmp_path / "out")
    for loaded in (bitfold.load(tmp_path / "out"), type(model).from_pretrained(tmp_path / "out")):  # type: ignore[attr-defined]
        check_same_tensors(loaded, model)
        check_all_same_answers(outputs(loaded, inputs), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "whisper"])
def test_generation(name: str) -> None:
    """With a cache, token by token: the same tokens as the dequantized float model."""
    case = ZOO[name]
    model, _ = quantized(case, RECIPES["int4-asym-g24"])
    inputs = {k: v for k, v in case.inputs().items() if not k.startswith("decoder")}
    answers: list[torch.Tensor] = [
        m.generate(**inputs, max_new_tokens=6, do_sample=False)  # type: ignore[operator]
        for m in (model, dequantized(case, model))
    ]
    assert answers[0].tolist() == answers[1].tolist()


@cases
def test_int8_activations(case: Case) -> None:
    """W8A8: rounding activations to 8 bits costs what 8 bits cost, not more."""
    model = case.build()
    exact = outputs(model, case.inputs())
    bitfold.quantize_(model, Recipe.of("int8", fit="absmax", act="int8"))
    for got, reference in zip(outputs(model, case.inputs()), exact, strict=True):
        assert (got - reference).norm() <= 0.05 * reference.norm()


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "t5", "bert-masked"])
def test_embeddings_and_heads_when_a_rule_names_them(name: str, tmp_path: Path) -> None:
    case = ZOO[name]
    model = case.build()
    everything = Recipe(
        (Rule("re:.*(lm_head|embed|wte|wpe|shared|decoder)", "int8", fit="absmax"), *RECIPES["int8"].rules)
    )
    outcomes = bitfold.quantize_(model, everything)
    assert sum(o.format is not None for o in outcomes) > case.quantized
    check_close(outputs(model, case.inputs()), dequantized(case, model), case)
    expected = outputs(model, case.inputs())
    bitfold.save(model, tmp_path / "out")
    check_same(bitfold.load(tmp_path / "out"), model, expected, case)


def test_a_copy_is_independent() -> None:
    case = ZOO["llama"]
    model = case.build()
    bitfold.quantize_(model, RECIPES["int8"])
    expected = outputs(model, case.inputs())
    other = copy.deepcopy(model)
    for weight in weights_of(other).values():
        weight.scale.zero_()  # type: ignore[operator]
    assert all(bool(weight.scale.any()) for weight in weights_of(model).values())  # type: ignore[operator,union-attr]
    check_all_same_answers(outputs(model, case.inputs()), expected)
