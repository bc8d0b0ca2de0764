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
        weight_rate: of `weights`, likewise: there are thousands of times as many, and ten times as fast they unlearn.
        likeliest: words of each of the teacher's predictions that are kept.
        windows: of the text at most, those held out included.
        start_token: windows begin as the tokenizer begins a text.
        seed: of the order of windows.
        weights: what the blocks' linear layers have in floating point is trained, too: of a folder that is packed in
            part, the rest makes up for what the packed part has lost.
        first: windows of the text that are passed over (and come last).
        looks: at the windows held out, if that takes no more than a tenth of the time; with one, at the end, nothing
            is kept on the way.
    """

    text: str = BUNDLED
    minutes: float = 30.0
    steps: int | None = None
    seqlen: int = 1024
    batch: int = 2
    rate: float = 4e-3
    plain_rate: float = 1e-3
    weight_rate: float = 2e-4
    likeliest: int = 256
    windows: int = 512
    start_token: bool = True
    seed: int = 0
    weights: bool = False
    first: int = 0
    looks: int = 20

    def __post_init__(self) -> None:
        if not self.minutes > 0 or (self.steps is not None and self.steps < 1):
            raise UsageError("distillation needs some time, or at least one step", hint="--minutes 30")
        if self.seqlen < 8 or self.batch < 1 or self.windows < 2 or self.likeliest < 1:
            raise UsageError("distillation needs windows of at least eight tokens, two of them, and one word of each")
        if not min(self.rate, self.plain_rate, self.weight_rate) >= 0:
            raise UsageError("a learning rate is not negative")


@dataclass(frozen=True)
class Finetuning:
    """How to train adapters.

    Args:
        data: what is learned: a file of text or data, or a data set of the Hub; see `text.documents`.
        epochs: times that all of it is read; what is not named as `steps` or `minutes`.
        steps: so many instead.
        minutes: as many steps as this time allows instead; found out at the start, and kept.
        seqlen: tokens of a window; fewer if the model takes no more.
        batch: windows of a step; they are read one after the other, so that memory is that of one.
        rate: learning rate of the adapters.
        rank, alpha: of the adapters: W + alpha / rank * B A, with A (rank, k) and B (n, rank).
        targets: names of layers that get one, as PEFT reads them; "all-linear" alone: all but the output head.
        windows: of the text at most, those held out included.
        start_token: windows begin as the tokenizer begins a text.
        seed: of the adapters and the order of windows.
        answers_only: of conversations, only what the assistant says is learned; the rest is read.
    """

    data: str
    epochs: float = 1.0
    steps: int | None = None
    minutes: float | None = None
    seqlen: int = 512
    batch: int = 8
    rate: float = 2e-4
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("all-linear",)
    windows: int = 1 << 16
    start_token: bool = True
    seed: int = 0
    answers_only: bool = False

    def __post_init__(self) -> None:
        if self.steps is not None and self.minutes is not None:
            raise UsageError("either so many steps or so many minutes", where="--steps, --minutes")
        if (self.minutes is not None and not self.minutes > 0) or (self.steps is not None and self.steps < 1):
            raise UsageError("finetuning needs some time, or at least one step", hint="--minutes 30")
        if not self.epochs > 0:
            raise UsageError("the text is read at least in part", where=f"--epochs {self.epochs}")
        if self.seqlen < 8 or self.batch < 1 or self.windows < 2:
            raise UsageError("finetuning needs windows of at least eight tokens, and two of them")
        if self.rank < 1 or not self.alpha > 0 or not self.targets:
            raise UsageError("adapters have a rank of at least 1, a positive alpha, and layers that they stand beside")
        if not self.rate >= 0:
            raise UsageError("a learning rate is not negative", where="--rate")
