"""What these tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny_lm


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with its tokenizer."""
    folder = tmp_path_factory.mktemp("calibrated") / "source"
    tiny_lm.model().save_pretrained(folder)
    tiny_lm.tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(tiny_lm.TEXT, encoding="utf-8")
    return folder
