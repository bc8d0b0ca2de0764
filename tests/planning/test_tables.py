"""Embeddings and output heads where only bits are asked for: 8 bits, unless they are to be kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import bitfold
import tiny_lm
from bitfold.checkpoints.repack import repack
from bitfold.checkpoints.safetensors import SafetensorsSource
from bitfold.engine.generation import Writer
from bitfold.engine.sampling import Sampling
from bitfold.models.sites import EMBEDDING as EMBEDDING_KIND
from bitfold.models.sites import Site
from bitfold.models.swap import quantize_site_tensor, transform_of
from bitfold.planning import tables
from bitfold.planning.tables import naming_tables, vocabulary_size
from bitfold.recipes.recipe import Recipe, Rule

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def llama(folder: Path, *, tied: bool) -> Path:
    model = tiny_lm.model()
    if tied:
        config: Any = model.config
        config.tie_word_embeddings = True
        model.tie_weights()  # type: ignore[operator]
    return tiny_lm.folder(folder, model)


def formats(folder: Path) -> dict[str, str]:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return {name: entry["format"] for name, entry in config["tensors"].items()}


@pytest.mark.parametrize("tied", [True, False])
def test_bits_mean_them_too(tmp_path: Path, tied: bool) -> None:
    """The file shrinks, loads everywhere, and loses next to nothing more than with tables in floating point."""
    source = llama(tmp_path / "source", tied=tied)
    packed = bitfold.quantize(source, tmp_path / "packed", bits=4, method="rtn")
    kept = bitfold.quantize(source, tmp_path / "kept", bits=4, method="rtn", keep_embeddings=True)
    found = formats(tmp_path / "packed")
    assert {found.pop(name) for name in (EMBEDDING,) + (() if tied else (HEAD,))} == {"int8"}
    assert found == formats(tmp_path / "kept")
    assert packed.bytes_after < kept.bytes_after
    assert [rule["match"] for rule in packed.recipe] == ["*", *([EMBEDDING] if tied else [EMBEDDING, HEAD])]
    losses = []
    for folder in ("packed", "kept"):
        result = bitfold.evaluate(str(tmp_path / folder), str(source), tiny_lm.TEXT, context=64, max_tokens=512)
        assert result.kl_mean is not None
        losses.append(result.kl_mean)
    assert losses[0] < losses[1] + 0.01
    theirs: Any = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    ours: Any = bitfold.load(tmp_path / "packed", dtype=torch.float32)
    ids = torch.tensor([[3, 5, 8]])
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-4)
    writer = Writer.open(str(tmp_path / "packed"))
    writer.write("the quick", Sampling(max_new_tokens=3))
    assert writer.native  # the engine has loops for them


def test_rules_come_first(tmp_path: Path) -> None:
    """What a rule names, ignores included, is left to it; formats and recipes say all themselves."""
    source = llama(tmp_path / "source", tied=False)
    bitfold.quantize(source, tmp_path / "a", bits=8, ignore=["lm_head"])
    assert formats(tmp_path / "a")[EMBEDDING] == "int8"
    assert HEAD not in formats(tmp_path / "a")
    bitfold.quantize(source, tmp_path / "b", format="int4")
    assert not {EMBEDDING, HEAD} & set(formats(tmp_path / "b"))


def test_small_tables_stay(tmp_path: Path) -> None:
    """Positions are no words."""
    config = hf.GPT2Config(vocab_size=257, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    torch.manual_seed(0)
    tiny_lm.folder(tmp_path / "gpt2", hf.GPT2LMHeadModel(config))
    bitfold.quantize(tmp_path / "gpt2", tmp_path / "out", bits=8)
    assert formats(tmp_path / "out")["transformer.wte.weight"] == "int8"
    assert "transformer.wpe.weight" not in formats(tmp_path / "out")


def test_where_the_model_would_not_run_they_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "rehearse", lambda _model, entries: "it would fail" if EMBEDDING in entries else None)
    source = llama(tmp_path / "source", tied=False)
    report = bitfold.quantize(source, tmp_path / "out", bits=8)
    assert EMBEDDING not in formats(tmp_path / "out")
    assert any("stay as they are: it would fail" in line for line in report.preflight["substitutes"])


@pytest.mark.parametrize("kind", ["gptq", "compressed-tensors"])
def test_engines_get_them_plain(tmp_path: Path, kind: str) -> None:
    source = llama(tmp_path / "source", tied=False)
    bitfold.quantize(source, tmp_path / "q", bits=4, method="gptq", group_size=32, format=None)
    repack(tmp_path / "q", tmp_path / "out", kind)
    names = SafetensorsSource(tmp_path / "out").names()
    assert {EMBEDDING, HEAD} <= set(names)


def test_the_vocabulary_of_a_model_of_text_and_pictures() -> None:
    assert vocabulary_size({"text_config": {"vocab_size": 7}}) == 7
    assert vocabulary_size({"vocab_size": 9}) == 9
    assert vocabulary_size({"vocab_size": None}) is None


def test_large_columns_do_not_set_the_scale_of_all_others() -> None:
    """One column of forty times the others: rotated, the table's error stays that of 8 bits."""
    torch.manual_seed(0)
    w = torch.randn(300, 64)
    w[:, 5] *= 40
    site = Site("embed.weight", EMBEDDING_KIND, (300, 64), "embedding")
    rule = naming_tables(Recipe.of("int4"), [site], {"vocab_size": 300}).rules[-1]
    assert rule.scheme is not None
    basis = transform_of(rule.scheme, site, 0)
    assert basis is not None
    back = basis.inverse(quantize_site_tensor(w, site, rule.scheme, 0).dequantize())
    unrotated = Rule("*", rule.format).scheme
    assert unrotated is not None
    plain = quantize_site_tensor(w, site, unrotated, 0).dequantize()
    others = [i for i in range(64) if i != 5]
    assert (back - w)[:, others].square().mean() < 0.2 * (plain - w)[:, others].square().mean()
