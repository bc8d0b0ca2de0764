"""Limits of length under their many names; classes of configs that name none."""

from __future__ import annotations

import pytest
import transformers as hf

import tiny_lm
from bitfold.models import skeleton
from bitfold.models.limits import positions
from bitfold.models.model_ref import ModelRef


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (hf.LlamaConfig(max_position_embeddings=77), 77),
        (hf.GPT2Config(n_positions=33), 33),
        (hf.MptConfig(max_seq_len=64), 64),
        (hf.RobertaConfig(max_position_embeddings=66, pad_token_id=1), 64),
        (hf.XLNetConfig(), None),
        (hf.LlavaConfig(text_config=hf.LlamaConfig(max_position_embeddings=55)), 55),
        (hf.BloomConfig(), None),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_positions(config, wanted):
    assert positions(config) == wanted


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "LlamaForCausalLM"),
        ("bert", "BertForMaskedLM"),
        ("t5", "T5ForConditionalGeneration"),
        ("llava", "LlavaForConditionalGeneration"),
        ("vit", "ViTModel"),
    ],
)
def test_a_config_that_names_no_class(kind, name):
    assert skeleton.model_class({"model_type": kind}).__name__ == name  # type: ignore[union-attr]
    assert skeleton.model_class({"model_type": "nobody's"}) is None


def test_the_limit_of_a_module_and_of_a_folder(tmp_path):
    model = tiny_lm.model()
    assert ModelRef.of(model).longest == tiny_lm.POSITIONS
    assert ModelRef.of(tiny_lm.folder(tmp_path / "model", model)).longest == tiny_lm.POSITIONS
