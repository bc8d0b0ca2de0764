"""A small random language model with a byte-level tokenizer, as a folder like those of the Hub."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

POSITIONS = 128
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT = "".join(f"Line {i}: the quick brown fox jumps over {i * i} lazy dogs — déjà vu!\n" for i in range(60))


def tokenizer(chat: bool = True) -> hf.PreTrainedTokenizerFast:
    """256 bytes and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, "<end>"])}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = hf.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>")
    if chat:
        made.chat_template = CHAT
    return made


def model(seed: int = 0) -> nn.Module:
    """Two Llama layers whose predictions are far from uniform."""
    config = hf.LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=POSITIONS, tie_word_embeddings=False, eos_token_id=256,
        bos_token_id=None, pad_token_id=256, initializer_range=0.15,
    )  # fmt: skip
    torch.manual_seed(seed)
    made: nn.Module = hf.LlamaForCausalLM(config)
    return made.eval()


def encoder(cls: str = "BertModel", seed: int = 0) -> nn.Module:
    """A small BERT."""
    config = hf.BertConfig(
        vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=POSITIONS, initializer_range=0.15,
    )  # fmt: skip
    torch.manual_seed(seed)
    made: nn.Module = getattr(hf, cls)(config)
    return made.eval()


def folder(path: Path, made: nn.Module, *, chat: bool = True) -> Path:
    """Save a model with the tokenizer."""
    made.save_pretrained(path)  # type: ignore[operator]
    tokenizer(chat).save_pretrained(path)
    return path


def disturbed(model: nn.Module, noise: float) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    return model
