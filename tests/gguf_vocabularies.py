"""Metadata of small vocabularies, and texts to try them on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

tokenizers = pytest.importorskip("tokenizers")

GOLDEN = json.loads((Path(__file__).parent / "golden" / "sentencepiece.json").read_text(encoding="utf-8"))
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "In 1987 , 12345 people",
    "  leading and\n\nlines\t",
    "it's we'LL naïve café 你好 🙂 ½",
    "",
    " ",
    "camelCase HTTPServer",
]


def sentencepiece_metadata(case: str) -> dict[str, Any]:
    """What the converter stores of the golden SentencePiece models."""
    user = ["<mark>"] if case == "no prefix" else []
    byte_pieces = [f"<0x{b:02X}>" for b in range(256)]
    pieces = GOLDEN[case]["pieces"]
    types = [2, 3, 3] + [4] * len(user) + [6] * 256 + [1] * len(pieces)
    scores = [0.0] * (len(types) - len(pieces)) + [-float(i) for i in range(len(pieces))]
    roles = {"bos": 1, "eos": 2, "unknown": 0}
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *user, *byte_pieces, *pieces],
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": case == "prefix",
        **{f"tokenizer.ggml.{role}_token_id": index for role, index in roles.items()},
    }


@pytest.fixture(scope="module")
def bpe() -> dict[str, Any]:
    """Metadata of a byte-level BPE trained here, without a pre-tokenizer's name."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    trained.train_from_iterator([*TEXTS, *GOLDEN["texts"]] * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "general.architecture": "llama",
        "llama.context_length": 512,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "tokenizer.ggml.merges": [" ".join(m) for m in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
