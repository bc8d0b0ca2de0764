"""Small random models of many families, each with inputs to run it on; deterministic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import nn

Inputs = dict[str, torch.Tensor]
TOKENS = 11
VOCABULARY = 99


@dataclass(frozen=True)
class Case:
    """A model family.

    Args:
        build: makes the model, float32, in eval mode; the same weights every time.
        inputs: what to call it with.
        quantized: how many weights a recipe for everything must quantize.
        saved: whether transformers can write it and bitfold read it back without being given the module.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    quantized: int
    saved: bool = True


def outputs(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Every float tensor that the model returns (caches aside), in order."""
    with torch.inference_mode():
        result = model(**inputs)
    found = list(_tensors(result))
    assert found, type(result)
    return found


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            if name not in ("past_key_values", "cache_params"):
                yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _hf(cls: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = getattr(hf, cls)(getattr(hf, config)(**options))
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():  # biases and norms are born as zeros and ones: give them values
            if parameter.dim() == 1:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        return model.eval()

    return build


def _text(**more: torch.Tensor) -> Callable[[], Inputs]:
    ids = torch.randint(3, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(2))
    return lambda: {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


_LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
_MOE: dict[str, Any] = {**_LLAMA, "num_experts_per_tok": 2}
_BERT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
_WHISPER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_mel_bins": 16,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_source_positions": 20,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
_T5: dict[str, Any] = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
}
_VIT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


class Plain(nn.Module):
    """Convolutions, a perceptron, attention, one layer used twice, two layers with one weight; not of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.mlp = nn.Sequential(nn.Linear(128, 50), nn.GELU(), nn.Linear(50, 48, bias=False))
        self.attention = nn.MultiheadAttention(48, 4, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(48, 4, 70, batch_first=True)
        self.twice = nn.Linear(48, 48)
        self.again = self.twice
        self.first, self.second = nn.Linear(48, 48), nn.Linear(48, 48)
        self.second.weight = self.first.weight
        self.head = nn.Linear(48, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (batch, 3, 16, 16) -> (batch, 7)."""
        y = self.norm(self.conv(x)).relu().reshape(x.shape[0], 16, 128)
        y = self.mlp(y)
        y = y + self.attention(y, y, y, need_weights=False)[0]
        y = self.again(self.twice(self.encoder(y)).relu())
        y = self.second(self.first(y).relu())
        logits: torch.Tensor = self.head(y.mean(1))
        return logits


def _plain() -> nn.Module:
    torch.manual_seed(0)
    return Plain().eval()


ZOO: dict[str, Case] = {
    "llama": Case(_hf("LlamaForCausalLM", "LlamaConfig", **_LLAMA), _text(), 14),
    "llama-tied": Case(_hf("LlamaForCausalLM", "LlamaConfig", **_LLAMA, tie_word_embeddings=True), _text(), 14),
    "qwen2": Case(_hf("Qwen2ForCausalLM", "Qwen2Config", **_LLAMA), _text(), 14),
    "gemma3": Case(_hf("Gemma3ForCausalLM", "Gemma3TextConfig", **_LLAMA, head_dim=16), _text(), 14),
    "gpt2": Case(
        _hf("GPT2LMHeadModel", "GPT2Config", n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64),
        _text(),
        8,
    ),
    "mixtral": Case(_hf("MixtralForCausalLM", "MixtralConfig", **_MOE, num_local_experts=4), _text(), 12),
    "qwen3-moe": Case(
        _hf("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **_MOE, num_experts=4, moe_intermediate_size=40, head_dim=16),
        _text(),
        12,
    ),
    "gpt-oss": Case(
        _hf("GptOssForCausalLM", "GptOssConfig", **_MOE, num_local_experts=4, head_dim=16, sliding_window=8),
        _text(),
        12,
    ),
    "bert-masked": Case(_hf("BertForMaskedLM", "BertConfig", **_BERT), _text(), 13),
    "bert-classifier": Case(_hf("BertForSequenceClassification", "BertConfig", **_BERT, num_labels=3), _text(), 14),
    "bert-encoder": Case(_hf("BertModel", "BertConfig", **_BERT), _text(), 13),
    "llama-classifier": Case(
        _hf("LlamaForSequenceClassification", "LlamaConfig", **_LLAMA, num_labels=3, pad_token_id=0), _text(), 15
    ),
    "vit": Case(
        _hf("ViTForImageClassification", "ViTConfig", **_VIT), lambda: {"pixel_values": _noise(2, 3, 32, 32)}, 13
    ),
    "whisper": Case(
        _hf("WhisperForConditionalGeneration", "WhisperConfig", **_WHISPER),
        lambda: {"input_features": _noise(2, 16, 40), "decoder_input_ids": torch.tensor([[1, 5, 9], [1, 8, 3]])},
        32,
    ),
    "t5": Case(
        _hf("T5ForConditionalGeneration", "T5Config", **_T5),
        _text(decoder_input_ids=torch.tensor([[0, 5, 9], [0, 8, 3]])),
        32,
    ),
    "clip": Case(
        _hf(
            "CLIPModel",
            "CLIPConfig",
            text_config={**_BERT, "eos_token_id": 2, "bos_token_id": 1},
            vision_config=_VIT,
            projection_dim=32,
        ),
        _text(pixel_values=_noise(2, 3, 32, 32)),
        26,
    ),
    "plain": Case(_plain, lambda: {"x": _noise(2, 3, 16, 16)}, 9, saved=False),
}


_SMALL: dict[str, Any] = {**_LLAMA, "vocab_size": 257, "bos_token_id": 0, "eos_token_id": 256, "pad_token_id": 256}
_LAYERED = {**_SMALL, "num_hidden_layers": 4}
_MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
# Families whose blocks are not all alike, pass more than their output on, or are in several lists.
HYBRIDS: dict[str, Callable[[], nn.Module]] = {
    "mamba": _hf(
        "MambaForCausalLM", "MambaConfig", vocab_size=257, hidden_size=64, num_hidden_layers=2, state_size=8,
        time_step_rank=4, bos_token_id=0, eos_token_id=256, pad_token_id=256,
    ),
    "jamba": _hf(
        "JambaForCausalLM", "JambaConfig", **_LAYERED, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, num_experts=4, num_experts_per_tok=2, mamba_d_state=4, mamba_dt_rank=4,
    ),
    "bamba": _hf("BambaForCausalLM", "BambaConfig", **_LAYERED, **_MAMBA_HEADS, attn_layer_indices=[1, 3]),
    "lfm2": _hf("Lfm2ForCausalLM", "Lfm2Config", **_LAYERED, full_attn_idxs=[1, 3]),
    "rwkv": _hf(
        "RwkvForCausalLM", "RwkvConfig", vocab_size=257, hidden_size=64, num_hidden_layers=4, context_length=128,
        rescale_every=2, bos_token_id=0, eos_token_id=256,
    ),
    "glm5": _hf(
        "GlmMoeDsaForCausalLM", "GlmMoeDsaConfig", **{**_SMALL, "num_key_value_heads": 4}, n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=32, kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=16, index_n_heads=2, index_head_dim=32, index_topk=16, n_group=1, topk_group=1,
        n_shared_experts=1,
    ),
    "gemma3n": _hf(
        "Gemma3nForCausalLM", "Gemma3nTextConfig", **_LAYERED, head_dim=16, vocab_size_per_layer_input=257,
        hidden_size_per_layer_input=16, laurel_rank=8, num_kv_shared_layers=2, activation_sparsity_pattern=[0.0] * 4,
        layer_types=["full_attention", "sliding_attention"] * 2, sliding_window=16,
    ),
    "t5": _hf("T5ForConditionalGeneration", "T5Config", **{**_T5, "vocab_size": 257}),
    "bart": _hf(
        "BartForConditionalGeneration", "BartConfig", vocab_size=257, d_model=64, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96,
        max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
    ),
    "whisper": _hf("WhisperForConditionalGeneration", "WhisperConfig", **{**_WHISPER, "vocab_size": 257}),
    "llava": _hf(
        "LlavaForConditionalGeneration", "LlavaConfig", text_config={"model_type": "llama", **_SMALL},
        vision_config={"model_type": "clip_vision_model", **_VIT, "num_hidden_layers": 3, "projection_dim": 32},
        image_token_index=250,
    ),
    "xlnet": _hf("XLNetLMHeadModel", "XLNetConfig", vocab_size=257, d_model=64, n_layer=2, n_head=4, d_inner=96),
    "albert": _hf(
        "AlbertForMaskedLM", "AlbertConfig", **{**_BERT, "vocab_size": 257, "num_hidden_layers": 3}, embedding_size=32
    ),
}  # fmt: skip
