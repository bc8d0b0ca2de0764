"""A quantized model on every device: loaded, moved, judged, and writing what it writes on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bitfold
import tiny_lm
from bitfold.engine import Writer
from bitfold.engine.sampling import Sampling
from bitfold.errors import UsageError
from bitfold.evaluation import embedding_cosine, evaluate, layer_errors
from bitfold.nn import QWeight
from bitfold.run.driver import quantize

SIZES = {"context": 32, "max_tokens": 96}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm.folder(tmp_path_factory.mktemp("devices") / "original", tiny_lm.model())


@pytest.fixture(scope="module", params=["int4-g32", "trellis-3"])
def quantized(original: Path, request: pytest.FixtureRequest) -> Path:
    out = original.parent / request.param
    quantize(original, out, format=request.param, transform="hadamard")
    return out


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.tensor(tiny_lm.tokenizer()(tiny_lm.TEXT)["input_ids"])[None, :40]


def places(model: torch.nn.Module) -> set[str]:
    return {t.device.type for t in (*model.parameters(), *model.buffers())}


@torch.no_grad()
def test_a_model_runs_where_it_is_loaded(quantized, ids, device):
    here, there = bitfold.load(quantized), bitfold.load(quantized, device=device)
    assert places(there) == {device.type}
    assert any(isinstance(m, QWeight) for m in there.modules())
    logits = there(ids.to(device)).logits.cpu()
    assert torch.allclose(logits, here(ids).logits, atol=1e-3)


@torch.no_grad()
def test_a_model_goes_there_and_comes_back(quantized, ids, device):
    model = bitfold.load(quantized)
    before = model(ids).logits
    model.to(device)
    assert torch.allclose(model(ids.to(device)).logits.cpu(), before, atol=1e-3)
    model.to("cpu")
    assert torch.equal(model(ids).logits, before)


def test_eval_measures_the_same_there(quantized, original, device):
    found = [evaluate(quantized, original, tiny_lm.TEXT, device=where, **SIZES) for where in ("cpu", device)]
    assert found[1].perplexity == pytest.approx(found[0].perplexity, rel=1e-3)
    assert found[1].kl_mean == pytest.approx(found[0].kl_mean, rel=1e-2)
    assert found[1].bpw == found[0].bpw


def test_layers_are_measured_there(quantized, original, device):
    found = [layer_errors(quantized, original, tiny_lm.TEXT, swaps=2, device=d, **SIZES) for d in ("cpu", device)]
    for here, there in zip(*(f.layers for f in found), strict=True):
        assert there.weight_error == pytest.approx(here.weight_error, rel=1e-5)
        assert there.output_error == pytest.approx(here.output_error, rel=1e-3)
        assert (there.swap_kl is None) == (here.swap_kl is None)


def test_the_same_text_is_written_there(quantized, device):
    wanted = Sampling(12)
    texts = [Writer.open(quantized, device=where).write("Line 1: the", wanted).text for where in ("cpu", device)]
    assert texts[0] == texts[1]


def test_embeddings_are_compared_there(tmp_path, device):
    folder = tiny_lm.folder(tmp_path / "encoder", tiny_lm.encoder())
    quantize(folder, tmp_path / "q", format="int8")
    found = embedding_cosine(tmp_path / "q", folder, ["one text", "and a longer text"], device=device)
    assert found.cosine_min > 0.99


def test_a_module_runs_where_it_is(ids, device):
    model = tiny_lm.model()
    if device.type == "cpu":
        evaluate(model, None, tiny_lm.TEXT, tokenizer=tiny_lm.tokenizer(), device=device, **SIZES)
        return
    with pytest.raises(UsageError, match="runs where it is"):
        evaluate(model, None, tiny_lm.TEXT, tokenizer=tiny_lm.tokenizer(), device=device, **SIZES)
