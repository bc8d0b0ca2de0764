"""Folders of a size: never larger, reckoned and compared, the same plan after an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

import bitfold
import tiny_lm
from bitfold.calibration import importance
from bitfold.calibration.options import Calibration
from bitfold.checkpoints.inspection import inspect
from bitfold.errors import CheckpointError, ModelError, ResourceError, UsageError
from bitfold.planning.choices import CANDIDATES
from bitfold.recipes.recipe import Recipe
from bitfold.run import budget, driver, export
from bitfold.run.importance import make_imatrix

RECIPE = "bitfold_recipe.toml"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_lm.folder(tmp_path_factory.mktemp("budget") / "source", tiny_lm.model())
    (folder.parent / "text.txt").write_text(tiny_lm.TEXT, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def text(source: Path) -> Calibration:
    return Calibration(str(source.parent / "text.txt"), nsamples=4, seqlen=32)


@pytest.fixture(scope="module")
def matrix(source: Path, text: Calibration) -> Path:
    made = source.parent / "m.gguf"
    make_imatrix(str(source), made, text, gradients=True)
    return made


def weights_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def formats_of(folder: Path) -> dict[str, str]:
    found = bitfold.load(folder)
    return {name: module.format.name for name, module in found.named_modules() if type(module).__name__ == "QWeight"}


@pytest.mark.parametrize("bpw", [3.2, 3.7, 4.0, 5.5])
def test_the_files_are_no_larger_and_fused_layers_alike(
    source: Path, text: Calibration, matrix: Path, tmp_path: Path, bpw: float
) -> None:
    out = tmp_path / "out"
    report = driver.quantize(source, out, target_bpw=bpw, method="rtn", imatrix=matrix, calibration=text)
    size = weights_of(out)
    assert report.preflight["output_bytes"] == size
    assert 0.9 * bpw < 8 * size / inspect(out).numel <= bpw
    found = formats_of(out)
    for layer in ("model.layers.0", "model.layers.1"):
        for fused in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({found[f"{layer}.{name}.weight"] for name in fused}) == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_recipe_makes_the_same_folder(source: Path, text: Calibration, tmp_path: Path) -> None:
    driver.quantize(source, tmp_path / "a", target_bytes=45_000, calibration=text)
    driver.quantize(source, tmp_path / "b", recipe=tmp_path / "a" / RECIPE, calibration=text)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert first == second
    assert len(first) <= 45_000
    assert Recipe.load(tmp_path / "a" / RECIPE).rules


def test_more_bytes_lose_less(source: Path, text: Calibration, matrix: Path, tmp_path: Path) -> None:
    errors = []
    for size in (36_000, 50_000, 80_000):
        report = driver.quantize(
            source, tmp_path / str(size), target_bytes=size, method="rtn", imatrix=matrix, calibration=text
        )
        errors.append(sum(t.error or 0 for t in report.tensors))
    assert errors == sorted(errors, reverse=True)


def test_too_little_and_too_much(source: Path, text: Calibration, matrix: Path, tmp_path: Path) -> None:
    given = {"method": "rtn", "imatrix": matrix, "calibration": text}
    with pytest.raises(UsageError, match="smallest that can be made of this model") as it:
        driver.quantize(source, tmp_path / "out", target_bpw=1.0, **given)
    assert not list(tmp_path.iterdir())
    least = int(it.value.what.split(" takes ")[1].split()[0])
    report = driver.quantize(source, tmp_path / "out", target_bytes=least, **given)
    assert weights_of(tmp_path / "out") == least
    assert {t.format for t in report.tensors} == {None, CANDIDATES[0].format}
    large = driver.quantize(source, tmp_path / "large", target_bpw=20, **given)
    assert "more than 8 bits everywhere need" in (large.method or "")
    assert {t.format for t in large.tensors} == {None, "int8"}


@pytest.mark.parametrize(("where", "asked"), [("out", {}), ("out.gguf", {"export": "gguf:auto"})])
def test_a_size_that_cannot_be_is_refused_before_anything_is_measured(
    source: Path, text: Calibration, tmp_path: Path, where: str, asked: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (budget, export):
        monkeypatch.setattr(module, "measured", None)
    with pytest.raises(UsageError, match="smallest"):
        driver.quantize(source, tmp_path / where, target_bytes=5_000, calibration=text, **asked)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "more",
    [
        {"bits": 4},
        {"format": "int4"},
        {"group_size": 32},
        {"transform": "none"},
        {"method": "gptq"},
        {"recipe": Recipe.of("int8")},
        {"target_bytes": 50_000},
        {"export": "gptq"},
    ],
)
def test_what_a_budget_chooses_is_not_said(source: Path, tmp_path: Path, more: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        driver.quantize(source, tmp_path / "out", target_bpw=4.0, **more)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bpw", [0.0, -2.0, float("nan"), float("inf")])
def test_no_number_of_bits(source: Path, tmp_path: Path, bpw: float) -> None:
    with pytest.raises(UsageError, match="make no sense"):
        driver.quantize(source, tmp_path / "out", target_bpw=bpw)


def test_an_importance_matrix_of_another_model(source: Path, matrix: Path, tmp_path: Path) -> None:
    other = tiny_lm.folder(tmp_path / "other", tiny_lm.encoder("BertForMaskedLM"))
    with pytest.raises(CheckpointError, match="importance matrix"):
        driver.quantize(other, tmp_path / "out", target_bpw=7.0, method="rtn", imatrix=matrix)


SIZES = {"vocab_size": 257, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def small(kind: str) -> torch.nn.Module:
    """Of families whose weights are named, stored or reached in other ways."""
    torch.manual_seed(0)
    llama = {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 128}
    if kind == "conv1d":
        return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=257, n_embd=64, n_layer=2, n_head=4, n_positions=128))
    if kind == "experts":
        return hf.MixtralForCausalLM(hf.MixtralConfig(**llama, num_local_experts=4))
    seen = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = hf.CLIPVisionConfig(**seen, image_size=28, patch_size=14)
    text = hf.Qwen2Config(**llama, tie_word_embeddings=True)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=250)
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "bpw"), [("conv1d", 5.0), ("experts", 4.5), ("pictures", 10.0)])
def test_other_families(text: Calibration, tmp_path: Path, kind: str, bpw: float) -> None:
    source = tiny_lm.folder(tmp_path / "source", small(kind).to(torch.bfloat16))
    report = driver.quantize(source, tmp_path / "out", target_bpw=bpw, method="rtn", calibration=text)
    assert weights_of(tmp_path / "out") <= bpw * inspect(tmp_path / "out").numel / 8
    found = {t.tensor: t.format for t in report.tensors if t.format is not None}
    if kind == "experts":
        assert len({name for key, name in found.items() if "layers.0" in key and ".experts." in key}) == 1
    if kind == "pictures":
        unreached = {name for key, name in found.items() if "vision" in key or "projector" in key}
        assert unreached == {"int8"}
        assert "weights that no text reaches get int8" in (report.method or "")


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_makes_no_logits_is_told_of(text: Calibration, tmp_path: Path) -> None:
    source = tiny_lm.folder(tmp_path / "source", tiny_lm.encoder())
    with pytest.raises(ModelError, match="what errors cost cannot be measured"):
        driver.quantize(source, tmp_path / "out", target_bpw=8.0, method="rtn", calibration=text)


def test_a_ceiling_of_memory_that_is_too_low(source: Path, text: Calibration, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="whole model in memory"):
        driver.quantize(source, tmp_path / "out", target_bpw=4.0, calibration=text, max_memory=1 << 20)


def test_tables_stay_as_they_are_where_that_is_asked(
    source: Path, text: Calibration, matrix: Path, tmp_path: Path
) -> None:
    given = {"method": "rtn", "imatrix": matrix, "calibration": text, "keep_embeddings": True}
    report = driver.quantize(source, tmp_path / "out", target_bpw=14.0, **given)
    assert {t.tensor for t in report.tensors if t.format is None and len(t.shape) > 1} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    assert weights_of(tmp_path / "out") <= 14.0 * inspect(tmp_path / "out").numel / 8


def test_an_interrupted_measurement_goes_on(
    source: Path, text: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished windows are not measured again, and what was decided is not decided again."""
    calls, real = [], importance.there_and_back

    def some(*args: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(importance, "there_and_back", some)
    given = {"target_bpw": 4.0, "method": "rtn", "calibration": text}
    with pytest.raises(KeyboardInterrupt):
        driver.quantize(source, tmp_path / "out", **given)
    with monkeypatch.context() as patch:
        patch.setattr(driver, "execute", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            driver.quantize(source, tmp_path / "out", **given)
    assert len(calls) == 3 + 2
    with monkeypatch.context() as patch:
        patch.setattr(budget, "weigh", None)
        driver.quantize(source, tmp_path / "out", **given)
    assert len(calls) == 5
    driver.quantize(source, tmp_path / "at once", **given)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "at once"))
    assert first == second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["at once", "out"]


def test_the_uniform_plan_is_used_where_a_text_says_that_it_is_better(
    source: Path, text: Calibration, matrix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "noisy_divergences", lambda *_: [2.0, 1.0])
    report = driver.quantize(source, tmp_path / "out", target_bpw=4.0, method="rtn", imatrix=matrix, calibration=text)
    assert "the uniform plan is better there, and is used" in (report.method or "")
    found = formats_of(tmp_path / "out")
    assert len({name for key, name in found.items() if "layers" in key}) == 1


def test_a_dry_run_writes_nothing(source: Path, text: Calibration, tmp_path: Path) -> None:
    report = driver.quantize(source, tmp_path / "out", target_bpw=4.0, calibration=text, dry_run=True)
    assert not list(tmp_path.iterdir())
    assert report.preflight["output_bytes"] <= 4.0 * sum(t.numel for t in report.tensors) / 8
