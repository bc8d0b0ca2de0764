"""Encoders are judged by what they are used for: do their sentence embeddings still point the same way?"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from bitfold.errors import ModelError, UsageError
from bitfold.models.model_ref import Model, ModelRef
from bitfold.models.vocabulary import refuse_unknown_tokens
from bitfold.system import progress
from bitfold.system.backend import find_device, within_memory


@dataclass(frozen=True)
class EmbeddingAgreement:
    """Cosines between the embeddings of the same text by two models.

    Args:
        cosine_mean, cosine_min: over the texts.
        texts: how many.
        width: numbers of an embedding.
        seconds: wall-clock time, loading included.
    """

    cosine_mean: float
    cosine_min: float
    texts: int
    width: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, keys as the attributes."""
        return asdict(self)


def embedding_cosine(
    model: Model,
    reference: Model,
    texts: Sequence[str],
    *,
    batch: int = 16,
    tokenizer: Any = None,
    max_length: int = 512,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
) -> EmbeddingAgreement:
    """Compare two encoders by the mean over tokens of the last hidden state, for each text.

    The reference runs first and is released before the model is loaded.

    Args:
        model, reference: folders, Hub repositories or modules with transformers' encoder interface.
        texts: sentences; empty ones are refused.
        batch: texts to run at once, padded to the longest.
        tokenizer: needed when both are modules; otherwise the reference's (the model's) own is used.
        max_length: longer texts are cut to this many tokens.
        dtype: what plain weights are computed in; None: as they are stored.
        device: where the models run, see `evaluate`.

    Raises:
        UsageError: no texts, or no tokenizer.
        ModelError: a model without hidden states, embeddings of different widths, or NaN.
    """
    if not texts or not all(t.strip() for t in texts):
        raise UsageError("there is nothing to embed, or an empty text among the texts", where="texts")
    start, place = time.monotonic(), find_device(device)
    judged, against = ModelRef.of(model), ModelRef.of(reference)
    if tokenizer is None:
        tokenizer = (against if against.path is not None else judged).tokenizer()
    batches = [
        tokenizer(list(texts[i : i + batch]), return_tensors="pt", padding=True, truncation=True, max_length=max_length)
        for i in range(0, len(texts), batch)
    ]
    b = _embeddings(against, "reference", batches, tokenizer, (dtype, place))
    a = _embeddings(judged, "evaluating", batches, tokenizer, (dtype, place))
    if a.shape != b.shape:
        raise ModelError(f"embeddings of {a.shape[1]} and {b.shape[1]} numbers cannot be compared", where=judged.name)
    cosines = torch.cosine_similarity(a.double(), b.double(), dim=-1)
    if not torch.isfinite(cosines).all():
        raise ModelError("NaN or infinity among the embeddings", where=judged.name)
    seconds = time.monotonic() - start
    return EmbeddingAgreement(cosines.mean().item(), cosines.min().item(), len(texts), a.shape[1], seconds)


def _embeddings(
    subject: ModelRef, label: str, batches: list[Any], tokenizer: Any, how: tuple[torch.dtype | None, torch.device]
) -> torch.Tensor:
    """float32 (texts, width)."""
    dtype, device = how
    parts = []
    with within_memory(device), progress.bar(label, len(batches)) as bar:
        model = subject.load("AutoModel", dtype, device=device)
        for tokens in batches:
            refuse_unknown_tokens(model, tokens["input_ids"], tokenizer)
            parts.append(_embed(model, tokens.to(device)).cpu())
            bar.advance()
    del model
    gc.collect()
    return torch.cat(parts)


@torch.no_grad()
def _embed(model: nn.Module, tokens: Any) -> torch.Tensor:
    output = model(**tokens, output_hidden_states=True)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None and getattr(output, "hidden_states", None):
        hidden = output.hidden_states[-1]
    if hidden is None:
        raise ModelError("the model returns no hidden states", where=type(model).__name__)
    mask = tokens["attention_mask"][..., None].float()
    mean: torch.Tensor = (hidden.float() * mask).sum(1) / mask.sum(1)
    return mean
