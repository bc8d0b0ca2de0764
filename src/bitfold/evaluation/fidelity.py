"""How far a causal language model has moved from its reference.

Three numbers, over windows of text without a begin-of-text token:

* perplexity, exp of the mean negative log-likelihood of the next token;
* KL(reference || model) for each token, in nats: what the change costs whatever the text says next, and a far less
  noisy number than the difference of two perplexities;
* top-1 agreement: how often both would say the same next token.

Everything is computed in float32 by default, also for bfloat16 checkpoints, so that what is measured is the change of
the weights and not the rounding of activations. The reference runs first and leaves its predictions on disk (see
`predictions`), so that the two models are never in memory together; a reference that the caller holds in memory is run
beside the model instead.
"""

from __future__ import annotations

import gc
import json
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bitfold import progress
from bitfold.errors import ModelError, QualityError, UsageError
from bitfold.evaluation import text as texts
from bitfold.evaluation.predictions import PIECE, DiskPredictions, Predictions, Writer
from bitfold.evaluation.text import Windows
from bitfold.subjects import Model, Subject, read_dtype, weight_files

_NOT_CAUSAL = "compare embeddings instead: bitfold eval --metric embedding, bitfold.evaluation.embedding_cosine"


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured; everything about the reference is None without one.

    Args:
        perplexity: exp(mean negative log-likelihood), of the model.
        reference_perplexity: the same, of the reference.
        kl_mean, kl_median, kl_p99, kl_max: KL(reference || model) for each token, nats.
        top1: fraction of tokens at which both find the same token most likely.
        tokens: predictions that counted.
        windows, context: how many windows of how many tokens.
        text: the name of the text.
        seconds: wall-clock time, loading included.
        bpw: stored bits per weight over the quantized tensors; None when none is.
        size: bytes of the weight files; None for a module.
    """

    perplexity: float
    reference_perplexity: float | None
    kl_mean: float | None
    kl_median: float | None
    kl_p99: float | None
    kl_max: float | None
    top1: float | None
    tokens: int
    windows: int
    context: int
    text: str
    seconds: float
    bpw: float | None
    size: int | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, keys as the attributes."""
        return asdict(self)

    def require(self, *, max_kl: float) -> None:
        """Raise QualityError when the mean KL divergence is above `max_kl` nats a token; UsageError without one."""
        if self.kl_mean is None:
            raise UsageError("a limit on the KL divergence needs a reference", hint="give --reference")
        if not self.kl_mean <= max_kl:
            raise QualityError(
                f"the mean KL divergence is {self.kl_mean:.5f} nats a token, above the limit of {max_kl:g}",
                hint="spend more bits, or quantize fewer layers",
            )


def evaluate(
    model: Model,
    reference: Model | None = None,
    text: str | PathLike[str] | None = None,
    *,
    context: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = texts.DEFAULT_MAX_TOKENS,
    batch: int = 1,
    tokenizer: Any = None,
    dtype: str = "float32",
    cache_dir: str | Path | None = None,
    revision: str | None = None,
) -> Evaluation:
    """Judge a causal language model, alone or against the model it was made from.

    Args:
        model: a folder (of bitfold or of transformers), a Hub repository, or a module.
        reference: the same, for the model to compare with.
        text: a UTF-8 file, or the text itself (then with a line break in it, or longer than a path); None: the excerpt
            of WikiText-2 that comes with the package.
        context: tokens of a window; None: 2048, or less if the models cannot take as many.
        stride: tokens between the starts of two windows; None: windows side by side. Each token is predicted once.
        max_tokens: tokens from the start of the text to use; None: all. A rest shorter than a window is left out.
        batch: windows to run at once.
        tokenizer: needed when both are modules; otherwise the reference's (the model's) own is used.
        dtype: "float32", "bfloat16", "float16", or "auto" for the dtype of the checkpoint.
        revision: branch, tag or commit of the model's Hub repository.
        cache_dir: keep the reference's predictions in this folder, for the next model to be compared with it.

    Raises:
        UsageError: a text that is missing or too short, sizes that do not fit, tokenizers that differ.
        ModelError: not a causal language model, or one that predicts NaN.
        CheckpointError, HubError: a model that cannot be read or fetched.
    """
    start = time.monotonic()
    judged = Subject.of(model, revision=revision)
    against = None if reference is None else Subject.of(reference)
    for subject in (judged, against):
        if subject is not None:
            subject.require_causal(_NOT_CAUSAL)
    windows = _windows(judged, against, texts.read_text(text), tokenizer, (context, stride, max_tokens))
    setting = _Setting(windows, batch, read_dtype(dtype))
    with _workspace(cache_dir) as folder:
        scores, bpw = _run(judged, against, setting, folder)
    size = None if judged.path is None else sum(f.stat().st_size for f in weight_files(judged.path))
    facts = {"text": texts.text_name(text), "bpw": bpw, "size": size, "seconds": time.monotonic() - start}
    return _summary(scores, windows, facts)


@dataclass(frozen=True)
class _Setting:
    windows: Windows
    batch: int
    dtype: torch.dtype | None


@dataclass(frozen=True)
class _Scores:
    """Sums and lists over all scored tokens; float64 and float32 respectively."""

    nll: float
    reference_nll: float | None = None
    kl: np.ndarray[Any, np.dtype[np.float32]] | None = None
    agreements: int = 0


def _windows(
    model: Subject,
    reference: Subject | None,
    text: str,
    tokenizer: Any,
    sizes: tuple[int | None, int | None, int | None],
) -> Windows:
    context, stride, max_tokens = sizes
    if tokenizer is not None:
        ids = texts.tokenize(text, tokenizer)
    else:
        with_path = [s for s in (reference, model) if s is not None and s.path is not None] or [model]
        ids, *others = (texts.tokenize(text, subject.tokenizer()) for subject in with_path)
        if any(not torch.equal(ids, other) for other in others):
            raise UsageError(
                "the model and the reference split the text into different tokens",
                where=model.name,
                hint="is it the right reference?",
            )
    return texts.cut(ids, _context(context, [s for s in (model, reference) if s]), stride, max_tokens)


def _context(asked: int | None, subjects: list[Subject]) -> int:
    limits = [limit for subject in subjects if (limit := subject.longest)]
    limit = min(limits, default=None)
    if asked is None:
        return min(texts.DEFAULT_CONTEXT, limit or texts.DEFAULT_CONTEXT)
    if limit is not None and asked > limit:
        raise UsageError(f"the model takes at most {limit} tokens, not {asked}", where="context")
    return asked


@contextmanager
def _workspace(cache_dir: str | Path | None) -> Iterator[Path]:
    if cache_dir is not None:
        folder = Path(cache_dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="bitfold-eval-") as temporary:
            yield Path(temporary)


def _run(judged: Subject, against: Subject | None, setting: _Setting, folder: Path) -> tuple[_Scores, float | None]:
    stored = None
    if against is not None and against.module is None:
        stored = _reference_on_disk(against, setting, folder)
    model = judged.load("AutoModelForCausalLM", setting.dtype)
    bpw = stored_bpw(model)
    if against is None:
        return _score(model, setting, None), bpw
    if stored is not None:
        predictions, nll = stored
        return replace(_score(model, setting, predictions), reference_nll=nll), bpw
    beside = against.load("AutoModelForCausalLM", setting.dtype)
    return _score_side_by_side(model, beside, setting), bpw


def _reference_on_disk(reference: Subject, setting: _Setting, folder: Path) -> tuple[DiskPredictions, float]:
    """The reference's predictions and its total negative log-likelihood; computed unless the folder has them."""
    windows = setting.windows
    origins = [sum(windows.scored(i) for i in range(w)) - windows.first(w) for w in range(len(windows))]
    key = f"{reference.fingerprint()[:24]}-{windows.digest()[:24]}-{setting.dtype or 'auto'}".replace("torch.", "")
    facts, data = folder / f"{key}.json", folder / f"{key}.predictions"
    if not (facts.is_file() and data.is_file()):
        facts.write_text(json.dumps(_write_predictions(reference, setting, data)), encoding="utf-8")
    known = json.loads(facts.read_text(encoding="utf-8"))
    return DiskPredictions(data, int(known["vocabulary"]), origins), float(known["nll"])


def _write_predictions(reference: Subject, setting: _Setting, path: Path) -> dict[str, Any]:
    model = reference.load("AutoModelForCausalLM", setting.dtype)
    writer = Writer(path, setting.windows.total)
    nll, vocabulary, complete = 0.0, 0, False
    try:
        with progress.bar("reference", setting.windows.total) as bar:
            for window, logits in _logits(model, setting):
                nll += _window_nll(logits, setting.windows, window)
                for piece in _pieces(setting.windows, window):
                    writer.append(logits[piece].float())
                vocabulary = int(logits.shape[-1])
                bar.advance(setting.windows.scored(window))
        complete = True
    finally:
        writer.close(complete=complete)
        del model
        gc.collect()
    return {"vocabulary": vocabulary, "nll": nll}


def _window_nll(logits: torch.Tensor, windows: Windows, window: int) -> float:
    total = 0.0
    for piece in _pieces(windows, window):
        targets = windows.ids[window, piece.start + 1 : piece.stop + 1, None]
        total -= torch.log_softmax(logits[piece].float(), -1).gather(1, targets).double().sum().item()
    return total


def _pieces(windows: Windows, window: int) -> Iterator[slice]:
    """Scored positions of a window, a few at a time."""
    for start in range(windows.first(window), windows.context - 1, PIECE):
        yield slice(start, min(start + PIECE, windows.context - 1))


@torch.no_grad()
def _logits(model: nn.Module, setting: _Setting) -> Iterator[tuple[int, torch.Tensor]]:
    """(window, logits (context, vocabulary) on the CPU) for each window in turn."""
    device = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    for first in range(0, len(setting.windows), setting.batch):
        ids = setting.windows.ids[first : first + setting.batch]
        output = model(input_ids=ids.to(device), use_cache=False)
        logits = output.logits if hasattr(output, "logits") else None
        if logits is None or logits.shape[:2] != ids.shape:
            raise ModelError("the model does not predict a next token for every position", where=type(model).__name__)
        for offset in range(len(ids)):
            yield first + offset, logits[offset].detach().cpu()


class _Beside:
    """The predictions of a module that runs in step with the model judged."""

    def __init__(self, model: nn.Module, setting: _Setting) -> None:
        self.setting = setting
        self.nll = 0.0
        self._source = _logits(model, setting)
        self._window, self._logits = -1, torch.empty(0)

    def rows(self, window: int, start: int, stop: int) -> torch.Tensor:
        """See `Predictions`; windows must be asked for in order."""
        while self._window < window:
            self._window, self._logits = next(self._source)
            self.nll += _window_nll(self._logits, self.setting.windows, self._window)
        return torch.log_softmax(self._logits[start:stop].float(), -1)


def _score_side_by_side(model: nn.Module, reference: nn.Module, setting: _Setting) -> _Scores:
    beside = _Beside(reference, setting)
    scores = _score(model, setting, beside)
    return replace(scores, reference_nll=beside.nll)


def _score(model: nn.Module, setting: _Setting, reference: Predictions | None) -> _Scores:
    windows = setting.windows
    nll, done, agreements = 0.0, 0, 0
    kl: list[torch.Tensor] = []
    with progress.bar("evaluating", windows.total) as bar:
        for window, logits in _logits(model, setting):
            for piece in _pieces(windows, window):
                q = torch.log_softmax(logits[piece].float(), -1)
                targets = windows.ids[window, piece.start + 1 : piece.stop + 1, None]
                nll -= q.gather(1, targets).double().sum().item()
                if reference is not None:
                    p = reference.rows(window, piece.start, piece.stop)
                    kl.append(_kl(p, q, type(model).__name__))
                    agreements += int((p.argmax(-1) == q.argmax(-1)).sum())
            if not math.isfinite(nll):
                raise ModelError(
                    f"NaN or infinity in the predictions of window {window + 1}", where=type(model).__name__
                )
            done += windows.scored(window)
            bar.advance(windows.scored(window), note=f"perplexity {_perplexity(nll, done):.3f}")
    return _Scores(nll, None, torch.cat(kl).numpy() if kl else None, agreements)


def _kl(p: torch.Tensor, q: torch.Tensor, name: str) -> torch.Tensor:
    """KL(p || q) of each row, nats, float32; entries that p rules out count nothing."""
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


def _perplexity(nll: float, tokens: int) -> float:
    return math.exp(min(nll / tokens, 700.0))


def _summary(scores: _Scores, windows: Windows, facts: dict[str, Any]) -> Evaluation:
    tokens, kl = windows.total, scores.kl
    reference = scores.reference_nll
    return Evaluation(
        perplexity=_perplexity(scores.nll, tokens),
        reference_perplexity=None if reference is None else _perplexity(reference, tokens),
        kl_mean=None if kl is None else float(kl.mean(dtype=np.float64)),
        kl_median=None if kl is None else float(np.median(kl)),
        kl_p99=None if kl is None else float(np.quantile(kl, 0.99)),
        kl_max=None if kl is None else float(kl.max()),
        top1=None if kl is None else scores.agreements / tokens,
        tokens=tokens,
        windows=len(windows),
        context=windows.context,
        **facts,
    )


def stored_bpw(model: nn.Module) -> float | None:
    """Stored bits per weight over all quantized weights of a model, shared ones once; None when there are none."""
    from bitfold.nn import QWeight

    weights = {id(m): m.qtensor for m in model.modules() if isinstance(m, QWeight)}.values()
    count = sum(math.prod(q.shape) for q in weights)
    return 8 * sum(q.nbytes for q in weights) / count if count else None
