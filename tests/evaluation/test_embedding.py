"""Cosines between the embeddings of two encoders."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_lm
from bitfold.errors import UsageError
from bitfold.evaluation import embedding_cosine
from tiny_lm import disturbed


def test_embedding_cosine_by_definition(tmp_path: Path) -> None:
    reference = tiny_lm.encoder()
    model = disturbed(copy.deepcopy(reference), 0.02)
    sentences = ["a cat", "the weather is fine today", "x"]
    result = embedding_cosine(model, reference, sentences, tokenizer=tiny_lm.tokenizer(), batch=2)
    cosines = []
    for sentence in sentences:  # one at a time: no padding, so the mask has nothing to do
        ids = torch.tensor([tiny_lm.tokenizer()(sentence)["input_ids"]])
        with torch.no_grad():
            a, b = (m(input_ids=ids).last_hidden_state[0].double().mean(0) for m in (model, reference))
        cosines.append((a @ b / a.norm() / b.norm()).item())
    assert result.cosine_mean == pytest.approx(np.mean(cosines), abs=1e-6)
    assert result.cosine_min == pytest.approx(min(cosines), abs=1e-6)
    assert 0.5 < result.cosine_min < 1 - 1e-5


def test_embedding_cosine_of_folders(tmp_path: Path) -> None:
    from bitfold.run.driver import quantize

    folder = tiny_lm.folder(tmp_path / "bert", tiny_lm.encoder())
    quantize(folder, tmp_path / "q", bits=8)
    result = embedding_cosine(tmp_path / "q", folder, ["one", "and another"])
    assert 0.999 < result.cosine_min < 1
    assert result.texts == 2
    with pytest.raises(UsageError, match="empty text"):
        embedding_cosine(folder, folder, ["one", " "])
