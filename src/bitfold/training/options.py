"""How to distill, as a value."""

from __future__ import annotations

from dataclasses import dataclass

from bitfold.errors import UsageError
from bitfold.text.tokens import BUNDLED


@dataclass(frozen=True)
class Distillation:
    """How to distill.

    Args:
        text: what is learned from: a file of text or data, "default" (the text that comes with bitfold), or the name
            of a data set of the Hub; see `text.documents`.
        minutes: that it may take in all; how many steps that makes is found out at the start, and kept.
        steps: so many instead.
        seqlen: tokens of a window; fewer if the model takes no more.
        batch: windows of a step.
        rate: of row scales; a factor of 1 moves so far in a first step.
        plain_rate: of norms and biases, times their root mean square.
        likeliest: words of each of the teacher's predictions that are kept.
        windows: of the text at most, those held out included.
        start_token: windows begin as the tokenizer begins a text.
        seed: of the order of windows.
    """

    text: str = BUNDLED
    minutes: float = 30.0
    steps: int | None = None
    seqlen: int = 1024
    batch: int = 2
    rate: float = 4e-3
    plain_rate: float = 1e-3
    likeliest: int = 256
    windows: int = 512
    start_token: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.minutes > 0 or (self.steps is not None and self.steps < 1):
            raise UsageError("distillation needs some time, or at least one step", hint="--minutes 30")
        if self.seqlen < 8 or self.batch < 1 or self.windows < 2 or self.likeliest < 1:
            raise UsageError("distillation needs windows of at least eight tokens, two of them, and one word of each")
        if not (self.rate >= 0 and self.plain_rate >= 0):
            raise UsageError("a learning rate is not negative")
