"""Configs as families write them: floats that JSON does not have, and values that a family refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import bitfold
import tiny_lm
from bitfold.errors import ModelError
from bitfold.models import skeleton

IDS = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its steps are limited to [0, Infinity]."""
    config = hf.Mamba2Config(
        vocab_size=257, hidden_size=64, state_size=16, num_hidden_layers=2, num_heads=4, head_dim=32, n_groups=2,
        chunk_size=16, eos_token_id=256, bos_token_id=None, pad_token_id=256, initializer_range=0.15,
    )  # fmt: skip
    torch.manual_seed(0)
    return tiny_lm.folder(tmp_path_factory.mktemp("mamba"), hf.Mamba2ForCausalLM(config).eval())


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("bare", [False, True])
def test_infinity_in_a_config(mamba: Path, tmp_path: Path, bare: bool) -> None:
    """As transformers 5 tags it, and as Python's json wrote it before."""
    text = json.loads((mamba / "config.json").read_text())
    assert text["time_step_limit"][1] == {"__float__": "Infinity"}
    if bare:
        text["time_step_limit"][1] = math.inf
    (mamba / "config.json").write_text(json.dumps(text))
    bitfold.quantize(mamba, tmp_path / "out", bits=8)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["time_step_limit"] == text["time_step_limit"]
    loaded = bitfold.load(tmp_path / "out")
    assert loaded.config.time_step_limit[1] == math.inf
    reference = logits(hf.Mamba2ForCausalLM.from_pretrained(mamba))
    assert float((logits(loaded) - reference).norm() / reference.norm()) < 0.05


@pytest.mark.parametrize(("tag", "value"), [("Infinity", math.inf), ("-Infinity", -math.inf)])
def test_tags_anywhere_in_a_config(tag: str, value: float) -> None:
    config = {"model_type": "llama", "rope_theta": {"__float__": tag}, "other": {"deep": [[{"__float__": tag}]]}}
    found = skeleton.config_object(config, "config.json")
    assert found.other == {"deep": [[value]]}


def test_what_looks_like_a_tag_is_left_alone() -> None:
    others = [{"__float__": "1.5"}, {"__float__": "Infinity", "more": 1}]
    assert skeleton.config_object({"model_type": "llama", "other": others}, "config.json").other == others


@pytest.mark.parametrize(
    ("kind", "changed"),
    [("llama", {"hidden_size": "many"}), ("bamba", {"mamba_d_head": 7}), ("mamba2", {"time_step_limit": "none"})],
)
def test_a_config_that_its_family_refuses(kind: str, changed: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="transformers refuses the config"):
        skeleton.config_object({"model_type": kind, **changed}, "config.json")


def test_a_model_that_cannot_be_built() -> None:
    config = {"model_type": "roberta", "architectures": ["RobertaForCausalLM"], "vocab_size": 99, "pad_token_id": 256}
    with pytest.raises(ModelError, match="cannot be built from this config: Padding_idx"):
        skeleton.of_config(config, "config.json")


@pytest.mark.parametrize("named", [{}, {"architectures": None}, {"architectures": []}])
@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("llama", "LlamaForCausalLM"),
        ("bert", "BertForMaskedLM"),
        ("t5", "T5ForConditionalGeneration"),
        ("marian", "MarianMTModel"),
        ("bart", "BartForConditionalGeneration"),
        ("mllama", "MllamaForConditionalGeneration"),
        ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
    ],
)
def test_without_a_class(kind: str, found: str, named: dict[str, Any]) -> None:
    """The class of the whole model, judged by its type; never that of its decoder alone."""
    assert skeleton.model_class({"model_type": kind, **named}) is getattr(hf, found)


def test_a_class_that_is_no_list() -> None:
    """One name alone is that name, not its letters."""
    config = {"model_type": "llama", "architectures": "LlamaForCausalLM"}
    assert skeleton.architectures(config) == ["LlamaForCausalLM"]
    assert skeleton.model_class(config) is hf.LlamaForCausalLM
