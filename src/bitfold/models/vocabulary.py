"""Tokens that a model has no row for: found before it runs, and said in words."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bitfold.errors import ModelError


def refuse_unknown_tokens(model: nn.Module, ids: torch.Tensor, tokenizer: Any = None) -> None:
    """ModelError for token ids beyond the embedding, or below zero; models whose embedding is no table pass.

    A tokenizer that was given tokens for which the embedding was not resized makes them.

    Args:
        model: of transformers; may be on the meta device.
        ids: int64, any shape.
        tokenizer: for the name of the token.
    """
    rows = embedding_rows(model)
    if rows is None or not ids.numel():
        return
    low, high = ids.min().item(), ids.max().item()
    if low >= 0 and high < rows:
        return
    wrong = int(low if low < 0 else high)
    name = None if tokenizer is None or wrong < 0 else tokenizer.convert_ids_to_tokens(wrong)
    token = f"token {wrong}" if name is None else f"token {wrong} ({name})"
    hint = "the tokenizer is that of another model, or was given tokens for which the embedding was not resized"
    raise ModelError(f"{token} has no row in the embedding, which has {rows}", where=type(model).__name__, hint=hint)


def embedding_rows(model: nn.Module) -> int | None:
    """Rows of the table that a model looks its tokens up in; None where it has none, or hides it."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        embedding = getter() if callable(getter) else None
    except (AttributeError, NotImplementedError):
        return None
    rows = getattr(embedding, "num_embeddings", None)
    return rows if isinstance(rows, int) else None
