"""What quantization cost: perplexity, KL divergence, agreement; layer by layer; embeddings; outliers; tasks."""

from __future__ import annotations

from bitfold.evaluation.embedding import EmbeddingAgreement, embedding_cosine
from bitfold.evaluation.fidelity import Evaluation, evaluate
from bitfold.evaluation.layers import LayerErrors, layer_errors
from bitfold.evaluation.outliers import Outliers, find_outliers

__all__ = [
    "EmbeddingAgreement",
    "Evaluation",
    "LayerErrors",
    "Outliers",
    "embedding_cosine",
    "evaluate",
    "find_outliers",
    "layer_errors",
]
