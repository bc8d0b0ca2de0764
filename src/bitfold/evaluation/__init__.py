"""What quantization cost: perplexity, KL divergence, top-1 agreement; cosines of sentence embeddings."""

from __future__ import annotations

from bitfold.evaluation.embedding import EmbeddingAgreement, embedding_cosine
from bitfold.evaluation.fidelity import Evaluation, evaluate

__all__ = ["EmbeddingAgreement", "Evaluation", "embedding_cosine", "evaluate"]
