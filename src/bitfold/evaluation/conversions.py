"""What a conversion loses, measured on its result before that gets its name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bitfold.evaluation.fidelity import Evaluation, evaluate
from bitfold.system import progress

TOKENS = 2048


class Measured:
    """A judge for `checkpoints.repack`: says the KL of the result from its source, and refuses what is above a limit.

    Args:
        source: what is converted.
        text: see `evaluate`.
        max_tokens: of the text.
        max_kl: nats a token; None: no limit.
    """

    def __init__(self, source: Path, text: str | None, max_tokens: int = TOKENS, max_kl: float | None = None) -> None:
        self._source, self._text, self._tokens, self._limit = source, text, max_tokens, max_kl
        self.found: Evaluation | None = None

    def __call__(self, result: Path, losses: Mapping[str, float]) -> None:
        """Measure, where anything is lost.

        Raises:
            QualityError: above the limit; the conversion is undone then.
        """
        if not losses:
            return
        for name, loss in losses.items():
            progress.say(f"{name}: relative square error {loss:.3e}")
        self.found = evaluate(result, self._source, self._text, max_tokens=self._tokens)
        progress.say(f"KL {self.found.kl_mean:.6f} nats a token from the source, over {self.found.tokens} tokens")
        self.found.require(max_kl=self._limit)
