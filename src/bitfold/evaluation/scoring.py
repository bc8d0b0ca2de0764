"""Score the predictions of a model, alone or against those of a reference, in one pass over the text."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bitfold.errors import CheckpointError, ModelError, UsageError
from bitfold.evaluation.predictions import TOGETHER, VERSION, DiskPredictions, Predictions, Writer, partial_of
from bitfold.evaluation.reading import Passages, Piece
from bitfold.models.model_ref import ModelRef
from bitfold.models.vocabulary import refuse_unknown_tokens
from bitfold.system import memory, progress
from bitfold.system.backend import CPU

TOP = 5
Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Setting:
    """What is read, and how.

    Args:
        passages: the text.
        batch: windows at once.
        dtype: what to compute in; None: as stored.
        auto_class: the kind of model, as transformers calls it.
        tokenizer: for the names of tokens; may be None.
        device: where models run.
    """

    passages: Passages
    batch: int
    dtype: torch.dtype | None
    auto_class: str
    tokenizer: Any = None
    device: torch.device = CPU

    def load(self, model: ModelRef) -> nn.Module:
        """The model as it is to be read. Errors as `ModelRef.load`."""
        return model.load(self.auto_class, self.dtype, device=self.device)

    def read(self, model: nn.Module) -> Iterator[Piece]:
        """Run a model over the text; ModelError for tokens that it has no row for."""
        refuse_unknown_tokens(model, self.passages.tokens, self.tokenizer)
        return self.passages.read(model, self.batch)


@dataclass
class Scores:
    """Sums over all predictions that count.

    Args:
        lost: negative log-likelihood, nats, of a few neighbouring predictions each.
        kl: KL(reference || model) of each prediction, float32.
        agreements: predictions with the same most likely token.
        shared: of the five most likely tokens of each prediction, how many both have, summed.
        seconds: running the model.
    """

    lost: list[float] = field(default_factory=list)
    done: int = 0
    kl: list[torch.Tensor] = field(default_factory=list)
    agreements: int = 0
    shared: int = 0
    seconds: float = 0.0

    def add(self, piece: Piece, reference: Predictions | None, name: str) -> None:
        """Count the predictions of a piece, a few rows at a time."""
        for logits, targets in _few_rows(piece):
            q = torch.log_softmax(logits, -1)
            self.lost.append(-_likelihood(q, targets))
            self.done += len(q)
            if not math.isfinite(self.lost[-1]):
                raise ModelError(f"NaN or infinity in the predictions of window {piece.window + 1}", where=name)
            if reference is not None:
                self._compare(reference.take(len(q)), q, name)

    def follow(self, others: Scores) -> None:
        """Take in the sums over the predictions that come next, which another process has counted meanwhile."""
        self.lost += others.lost
        self.kl += others.kl
        self.done += others.done
        self.agreements += others.agreements
        self.shared += others.shared
        self.seconds = max(self.seconds, others.seconds)

    def _compare(self, p: torch.Tensor, q: torch.Tensor, name: str) -> None:
        self.kl.append(divergence(p, q, name))
        first, second = p.argmax(-1), q.argmax(-1)
        self.agreements += int((first == second).sum())
        k = min(TOP, p.shape[-1])
        tops = p.topk(k).indices, q.topk(k).indices
        self.shared += int((tops[0][:, :, None] == tops[1][:, None, :]).sum())

    @property
    def nll(self) -> float:
        """Negative log-likelihood, nats: the same whoever has counted what."""
        return math.fsum(self.lost)

    @property
    def divergences(self) -> Floats | None:
        """KL of every prediction; None without a reference."""
        return torch.cat(self.kl).numpy() if self.kl else None


def _few_rows(piece: Piece) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits and targets of a piece, a few rows at a time: temporaries stay small."""
    yield from zip(torch.split(piece.logits, TOGETHER), torch.split(piece.targets, TOGETHER), strict=True)


def _likelihood(log_probabilities: torch.Tensor, targets: torch.Tensor) -> float:
    """Log-likelihood of the targets, nats, summed in float64."""
    return log_probabilities.gather(1, targets[:, None]).double().sum().item()


def divergence(p: torch.Tensor, q: torch.Tensor, name: str) -> torch.Tensor:
    """KL(p || q) of each row of log-probabilities, nats, float32; entries that p rules out count nothing."""
    if p.shape != q.shape:
        raise UsageError(
            f"the reference predicts {p.shape[-1]} tokens, the model {q.shape[-1]}",
            where=name,
            hint="is it the right reference?",
        )
    terms = p.exp().mul_(p - q)
    if p.min() == -torch.inf:
        terms.masked_fill_(p == -torch.inf, 0.0)
    return terms.sum(-1)


def perplexity(nll: float, tokens: int) -> float:
    """exp of the mean negative log-likelihood, capped at 1e304."""
    return math.exp(min(nll / tokens, 700.0))


def score(model: nn.Module, setting: Setting, reference: Predictions | None) -> Scores:
    """Run the model over the text and count."""
    scores, passages, name = Scores(), setting.passages, type(model).__name__
    pieces = setting.read(model)
    with progress.bar("evaluating", passages.total) as bar:
        while True:
            before = time.monotonic()
            piece = next(pieces, None)
            scores.seconds += time.monotonic() - before
            if piece is None:
                return scores
            scores.add(piece, reference, name)
            bar.advance(len(piece.targets), note=f"perplexity {perplexity(scores.nll, scores.done):.3f}")


class Beside:
    """The predictions of a module that runs in step with the model judged."""

    def __init__(self, model: nn.Module, setting: Setting) -> None:
        self.lost: list[float] = []
        self._source: Iterator[Piece] = setting.read(model)
        self._logits, self._targets = torch.empty(0, 0), torch.empty(0, dtype=torch.int64)

    def take(self, rows: int) -> torch.Tensor:
        """See `Predictions`; the pieces of both models are the same."""
        if not len(self._targets):
            piece = next(self._source)
            self._logits, self._targets = piece.logits, piece.targets
        if len(self._targets) < rows:  # pieces are cut by the size of the vocabulary
            raise UsageError("the reference and the model have vocabularies of different sizes", where="reference")
        p = torch.log_softmax(self._logits[:rows], -1)
        self.lost.append(-_likelihood(p, self._targets[:rows]))
        self._logits, self._targets = self._logits[rows:], self._targets[rows:]
        return p


@dataclass
class Outcome:
    """Of one reading of a text, or of a portion of it.

    Args:
        scores: of the model judged.
        lost: of the reference, as `Scores.lost`; None without one.
        bpw: stored bits per weight over the quantized tensors of the model judged; None when none is.
        model: it, as long as it is in memory.
    """

    scores: Scores
    lost: list[float] | None
    bpw: float | None
    model: nn.Module | None


def run_both(judged: ModelRef, against: ModelRef | None, setting: Setting, folder: Path) -> Outcome:
    """Read the text: the reference first, its predictions kept in the folder; or beside the model, if in memory."""
    if against is not None and against.module is None:
        predictions, lost = reference_on_disk(against, setting, folder)
        model = setting.load(judged)
        return Outcome(score(model, setting, predictions), lost, stored_bpw(model), model)
    model = setting.load(judged)
    if against is None:
        return Outcome(score(model, setting, None), None, stored_bpw(model), model)
    beside = Beside(setting.load(against), setting)
    return Outcome(score(model, setting, beside), beside.lost, stored_bpw(model), model)


def stored_bpw(model: nn.Module) -> float | None:
    """Stored bits per weight over all quantized weights of a model, shared ones once; None when there are none."""
    from bitfold.nn import QWeight

    weights = {id(m): m for m in model.modules() if isinstance(m, QWeight)}.values()
    count = sum(math.prod(w.qshape) for w in weights)
    return 8 * sum(w.nbytes for w in weights) / count if count else None


def reference_on_disk(reference: ModelRef, setting: Setting, folder: Path) -> tuple[DiskPredictions, list[float]]:
    """The reference's predictions, and what it lost, as `Scores.lost`; computed unless the folder has them.

    Raises:
        CheckpointError: the stored facts cannot be read.
    """
    dtype = str(setting.dtype or "auto").removeprefix("torch.")
    key = f"{reference.fingerprint()[:24]}-{setting.passages.digest()[:24]}-{dtype}-v{VERSION}"
    facts, data = folder / f"{key}.json", folder / f"{key}.predictions"
    if not (facts.is_file() and data.is_file()):
        found = json.dumps(_write_predictions(reference, setting, data))
        partial_of(facts).write_text(found, encoding="utf-8")
        partial_of(facts).replace(facts)
    try:
        known = json.loads(facts.read_text(encoding="utf-8"))
        return DiskPredictions(data, int(known["vocabulary"])), [float(x) for x in known["lost"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(facts), hint="delete the file") from error


def _write_predictions(reference: ModelRef, setting: Setting, path: Path) -> dict[str, Any]:
    model = setting.load(reference)
    writer = Writer(path, setting.passages.total)
    lost, vocabulary, complete = list[float](), 0, False
    try:
        with progress.bar("reference", setting.passages.total) as bar:
            for piece in setting.read(model):
                for logits, targets in _few_rows(piece):
                    lost.append(-_likelihood(torch.log_softmax(logits, -1), targets))
                writer.append(piece.logits)
                vocabulary = int(piece.logits.shape[-1])
                bar.advance(len(piece.targets))
        complete = True
    finally:
        writer.close(complete=complete)
        del model
        gc.collect()
        memory.trim()  # before the next model comes: freed pieces of logits would stay beside it
    return {"vocabulary": vocabulary, "lost": lost}
