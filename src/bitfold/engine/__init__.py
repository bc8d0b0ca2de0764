"""Text out of a model: one prompt, or a conversation; streamed as it is made."""

from __future__ import annotations

from bitfold.engine.generation import Generation, Sampling, Writer, generate

__all__ = ["Generation", "Sampling", "Writer", "generate"]
