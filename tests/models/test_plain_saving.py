"""A quantized model is not saved by those who would lose what its fields mean."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf

import bitfold
import tiny_lm
from bitfold.errors import UsageError


@pytest.mark.parametrize("loaded", [False, True])
def test_only_bitfold_saves(tmp_path, loaded):
    model = tiny_lm.model()
    bitfold.quantize_(model, "int8")
    bitfold.save(model, tmp_path / "ours")
    if loaded:
        model = bitfold.load(tmp_path / "ours")
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(UsageError, match="packed weights") as caught:
            one.save_pretrained(tmp_path / "theirs")  # type: ignore[operator]
        assert "bitfold.save" in str(caught.value.hint)
    assert not (tmp_path / "theirs").exists()
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(again(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)


def test_a_model_without_packed_weights_is_saved_as_ever(tmp_path):
    tiny_lm.model().save_pretrained(tmp_path / "plain")  # type: ignore[operator]
    assert (tmp_path / "plain" / "model.safetensors").is_file()
