"""Text out of a model: one prompt, or a conversation; streamed as it is made."""

from __future__ import annotations

from bitfold.system.collector import uncollected

with uncollected():  # a seventh of the time that importing PyTorch takes
    from bitfold.engine.generation import Generation, Writer, generate
    from bitfold.engine.grammar import Grammar
    from bitfold.engine.sampling import Sampling

__all__ = ["Generation", "Grammar", "Sampling", "Writer", "generate"]
