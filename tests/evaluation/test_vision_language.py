"""Models of text and images are judged on text alone, the original as the quantized folder is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import bitfold
import tiny_lm
from bitfold.errors import ModelError
from bitfold.models.model_ref import ModelRef

TEXT: dict[str, Any] = {
    "vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 256,
    "pad_token_id": 256, "initializer_range": 0.1,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
SIZES: dict[str, Any] = {"text": tiny_lm.TEXT, "context": 32, "max_tokens": 64}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}


def _llava() -> nn.Module:
    parts = {"text_config": hf.LlamaConfig(**TEXT), "vision_config": hf.CLIPVisionConfig(**VISION)}
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(**parts, image_token_index=255))


def _qwen2_vl() -> nn.Module:
    vision = {"embed_dim": 32, "hidden_size": 64, "depth": 1, "num_heads": 2, "patch_size": 8}
    config = hf.Qwen2VLConfig(text_config={**TEXT, **ROPE}, vision_config=vision)
    return hf.Qwen2VLForConditionalGeneration(config)


def _gemma3() -> nn.Module:
    text, tokens = (
        {**TEXT, "head_dim": 16, "query_pre_attn_scalar": 16},
        {"boi_token_index": 250, "eoi_token_index": 251},
    )
    config = hf.Gemma3Config(
        text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=252, **tokens
    )
    return hf.Gemma3ForConditionalGeneration(config)


def _mistral3() -> nn.Module:
    parts = {"text_config": hf.MistralConfig(**TEXT), "vision_config": hf.PixtralVisionConfig(**VISION)}
    return hf.Mistral3ForConditionalGeneration(hf.Mistral3Config(**parts, image_token_index=250))


def _paligemma() -> nn.Module:
    text, vision = hf.GemmaConfig(**TEXT, head_dim=16), hf.SiglipVisionConfig(**VISION)
    config = hf.PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=250, projection_dim=64)
    return hf.PaliGemmaForConditionalGeneration(config)


def _idefics3() -> nn.Module:
    config = hf.Idefics3Config(
        text_config=hf.LlamaConfig(**TEXT), vision_config=VISION, image_token_id=250, scale_factor=2
    )
    return hf.Idefics3ForConditionalGeneration(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llava": _llava,
    "qwen2-vl": _qwen2_vl,
    "gemma3": _gemma3,
    "mistral3": _mistral3,
    "paligemma": _paligemma,
    "idefics3": _idefics3,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_original_is_judged_as_what_was_quantized(name: str, tmp_path: Path):
    torch.manual_seed(0)
    original = tiny_lm.folder(tmp_path / "original", MODELS[name]())
    loaded = ModelRef.of(original).load("AutoModelForCausalLM", torch.float32)
    assert type(loaded) is type(MODELS[name]())
    bitfold.quantize(original, tmp_path / "q", bits=8)
    result = bitfold.evaluate(tmp_path / "q", original, **SIZES)
    assert result.kl_mean is not None
    assert 0 < result.kl_mean < 0.01
    assert result.reference_perplexity == pytest.approx(bitfold.evaluate(original, **SIZES).perplexity, rel=1e-5)


def _encoder_decoder(said: bool) -> nn.Module:
    config = hf.T5Config(vocab_size=257, d_model=64, d_ff=96, d_kv=16, num_layers=1, num_heads=4)
    model: Any = hf.T5ForConditionalGeneration(config)
    model.config.architectures = ["T5ForConditionalGeneration"] if said else None
    return model


@pytest.mark.parametrize("said", [True, False])
def test_encoder_decoders_are_refused_in_words(said: bool, tmp_path: Path):
    folder = tiny_lm.folder(tmp_path / "t5", _encoder_decoder(said))
    with pytest.raises(ModelError, match=r"T5ForConditionalGeneration is an encoder-decoder(.|\n)*bitfold generate"):
        bitfold.evaluate(folder)


def test_what_does_not_run_on_text_alone_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tiny_lm.folder(tmp_path / "llava", _llava())

    def pictures_please(*_: Any, **__: Any) -> None:
        raise ValueError("You must give pixel_values")

    monkeypatch.setattr(hf.LlavaForConditionalGeneration, "forward", pictures_please)
    with pytest.raises(ModelError, match="does not run on text alone: You must give pixel_values"):
        bitfold.evaluate(folder)
