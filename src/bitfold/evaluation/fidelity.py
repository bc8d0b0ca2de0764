"""How far a language model has moved from its reference.

Three numbers, over windows of text that begin as the tokenizer begins a text (see `text.windows`):

* perplexity, exp of the mean negative log-likelihood of the next token;
* KL(reference || model) for each token, in nats: what the change costs whatever the text says next, and a far less
  noisy number than the difference of two perplexities;
* agreement: how often both would say the same next token, and how many of the five most likely ones they share.

Masked language models predict hidden tokens instead of next ones; the numbers are otherwise the same, and the
perplexity is then a pseudo-perplexity (see `reading.MaskedPassages`).

Everything is computed in float32 by default, also for bfloat16 checkpoints, so that what is measured is the change of
the weights and not the rounding of activations. The reference runs first and leaves its predictions on disk (see
`predictions`), so that the two models are never in memory together; a reference that the caller holds in memory is run
beside the model instead.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitfold.checkpoints.inspection import inspect
from bitfold.errors import QualityError, UsageError
from bitfold.evaluation.reading import CausalPassages, Passages, masked_passages
from bitfold.evaluation.scoring import TOP, Outcome, Scores, Setting, perplexity, run_both
from bitfold.evaluation.shared import score_together
from bitfold.evaluation.tasks import check_tasks, run_tasks
from bitfold.executors.opening import LOCAL, check_executor, open_executor
from bitfold.models.model_ref import Model, ModelRef, read_dtype, weight_files
from bitfold.records.run_report import peak_memory
from bitfold.system.backend import find_device, within_memory
from bitfold.system.outputs import real_path, try_folder
from bitfold.text import windows as texts
from bitfold.text.start import start_name, text_start

CAUSAL, MASKED = "lm", "masked"
_AUTO = {CAUSAL: "AutoModelForCausalLM", MASKED: "AutoModelForMaskedLM"}
_MASKED_CONTEXT = 128


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured; everything about the reference is None without one.

    Args:
        perplexity: exp(mean negative log-likelihood), of the model; for masked models the pseudo-perplexity.
        reference_perplexity: the same, of the reference.
        kl_mean, kl_median, kl_p99, kl_max: KL(reference || model) for each token, nats.
        top1: fraction of tokens at which both find the same token most likely.
        top5: of the five tokens that each finds most likely, the fraction that both share.
        tokens: predictions that counted.
        windows, context: how many windows of how many tokens.
        metric: "lm" or "masked".
        text: the name of the text.
        start_token: what each window begins with, such as "<bos>"; None for nothing.
        seconds: wall-clock time, loading included.
        tokens_per_second: tokens read a second by the model judged.
        peak_memory: largest resident size of this process so far, bytes; None where the system does not tell.
        bpw: stored bits per weight over the quantized tensors; None when none is.
        bpw_whole: bits of the weight files for each weight of the model; None for a module.
        size: bytes of the weight files; None for a module.
        tasks: scores of tasks of lm-eval, by task and metric; None without tasks.
    """

    perplexity: float
    reference_perplexity: float | None
    kl_mean: float | None
    kl_median: float | None
    kl_p99: float | None
    kl_max: float | None
    top1: float | None
    top5: float | None
    tokens: int
    windows: int
    context: int
    metric: str
    text: str
    start_token: str | None
    seconds: float
    tokens_per_second: float
    peak_memory: int | None
    bpw: float | None
    bpw_whole: float | None
    size: int | None
    tasks: dict[str, dict[str, float]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, keys as the attributes."""
        return asdict(self)

    def require(
        self, *, max_kl: float | None = None, max_perplexity: float | None = None, min_top1: float | None = None
    ) -> None:
        """Check limits: mean KL divergence (nats a token), perplexity, top-1 agreement (fraction).

        Raises:
            QualityError: the first that is not kept.
            UsageError: a limit that needs a reference, without one.
        """
        if (max_kl is not None or min_top1 is not None) and self.kl_mean is None:
            raise UsageError("a limit on the KL divergence or agreement needs a reference", hint="give --reference")
        hint = "spend more bits, or quantize fewer layers"
        if max_kl is not None and self.kl_mean is not None and not self.kl_mean <= max_kl:
            what = f"the mean KL divergence is {self.kl_mean:.5f} nats a token, above the limit of {max_kl:g}"
            raise QualityError(what, hint=hint)
        if max_perplexity is not None and not self.perplexity <= max_perplexity:
            raise QualityError(
                f"the perplexity is {self.perplexity:.4f}, above the limit of {max_perplexity:g}", hint=hint
            )
        if min_top1 is not None and self.top1 is not None and not self.top1 >= min_top1:
            raise QualityError(f"the top-1 agreement is {self.top1:.4f}, below the limit of {min_top1:g}", hint=hint)


def evaluate(
    model: Model,
    reference: Model | None = None,
    text: str | PathLike[str] | None = None,
    *,
    metric: str = CAUSAL,
    context: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = texts.DEFAULT_MAX_TOKENS,
    batch: int = 1,
    tokenizer: Any = None,
    dtype: str = "float32",
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    start_token: bool = True,
    device: str | torch.device = "cpu",
    executor: str = LOCAL,
    workers: int | None = None,
) -> Evaluation:
    """Judge a language model, alone or against the model it was made from.

    Args:
        model: a folder (of bitfold or of transformers), a Hub repository, or a module.
        reference: the same, for the model to compare with.
        text: a file, a data set of the Hub, or the text itself (see `text.documents.text_pieces`); None: the excerpt of
            WikiText-2 that comes with the package.
        metric: "lm" for models that predict the next token, "masked" for those that fill in hidden ones.
        context: tokens of a window; None: 2048 (masked: 128), or less if the models cannot take as many or
            `max_tokens` are fewer.
        stride: tokens between the starts of two windows; None: windows side by side. Each token is predicted once.
        max_tokens: tokens from the start of the text to use; None: all. A rest shorter than a window is left out.
            Masked models read the text sixteen times over.
        batch: windows to run at once.
        tokenizer: needed when both are modules; otherwise the reference's (the model's) own is used.
        dtype: "float32", "bfloat16", "float16", or "auto" for the dtype of the checkpoint.
        cache_dir: keep the reference's predictions in this folder, for the next model to be compared with it.
        revision: branch, tag or commit of the model's Hub repository.
        tasks, limit: of lm-eval (extra `tasks`), run on the loaded model as well; documents of each, None: all.
        start_token: windows begin as the tokenizer begins a text (masked models': always).
        device, executor, workers: where the models run, as for `quantize`. Predictions are compared on the CPU.

    Raises:
        UsageError: a text that is missing or too short, sizes that do not fit, tokenizers that differ.
        ModelError: not a language model of the kind, or one that predicts NaN.
        CheckpointError, HubError: a model that cannot be read or fetched.
    """
    start, place = time.monotonic(), find_device(device)
    _check(metric, tasks, cache_dir, (executor, workers))
    judged, against = _subjects(model, revision, reference, metric)
    sizes = _Sizes(metric, context, stride, max_tokens, start_token)
    passages, tokenizer = _passages(judged, against, text, tokenizer, sizes)
    setting = Setting(passages, batch, read_dtype(dtype), _AUTO[metric], tokenizer, place)
    found = _outcome(judged, against, setting, cache_dir, (executor, workers))
    facts = {"metric": metric, "text": texts.text_name(text), "bpw": found.bpw, **_file_facts(judged)}
    if tasks and found.model is not None:
        facts["tasks"] = run_tasks(found.model, tokenizer, tasks, limit=limit, batch=batch)
    facts |= {"start_token": start_name(passages.start, tokenizer), "seconds": time.monotonic() - start}
    return _summary(found.scores, found.lost, passages, facts)


def _check(metric: str, tasks: Sequence[str], cache_dir: str | Path | None, how: tuple[str, int | None]) -> None:
    """UsageError, before anything is run, for an unknown metric, tasks that cannot be run, a folder that is none, an
    executor that there is not."""
    check_executor(*how)
    if how[0] != LOCAL and (tasks or cache_dir is not None):
        what = "tasks are run, and predictions kept, by one process"
        raise UsageError(what, where=f"--executor {how[0]}", hint="leave out --tasks and --cache-dir")
    if metric not in _AUTO:
        raise UsageError(f"unknown metric {metric!r}", hint=" or ".join(_AUTO))
    if tasks and metric != CAUSAL:
        raise UsageError("tasks of lm-eval are for causal language models", where="tasks")
    if tasks:
        check_tasks(tasks)
    if cache_dir is not None:
        try_folder(real_path(cache_dir))


def _subjects(
    model: Model, revision: str | None, reference: Model | None, metric: str
) -> tuple[ModelRef, ModelRef | None]:
    """What is judged and what it is compared with; ModelError where the metric does not suit them."""
    judged = ModelRef.of(model, revision=revision)
    against = None if reference is None else ModelRef.of(reference)
    for subject in (judged, against):
        if subject is not None:
            subject.require_kind(_AUTO[metric])
    return judged, against


@dataclass(frozen=True)
class _Sizes:
    metric: str
    context: int | None
    stride: int | None
    max_tokens: int | None
    start_token: bool


def _passages(
    model: ModelRef, reference: ModelRef | None, text: str | PathLike[str] | None, tokenizer: Any, sizes: _Sizes
) -> tuple[Passages, Any]:
    """The text as the models read it, and the tokenizer."""
    with_path = [s for s in (reference, model) if s is not None and s.path is not None] or [model]
    tokenizer, *others = [s.tokenizer() for s in with_path] if tokenizer is None else [tokenizer]
    start = text_start(tokenizer, sizes.start_token)
    ids, *same = [texts.read_tokens(text, one, enough=sizes.max_tokens) for one in (tokenizer, *others)]
    hint = "is it the right reference?"
    if any(not torch.equal(ids, other) for other in same):
        what = "the model and the reference split the text into different tokens"
        raise UsageError(what, where=model.name, hint=hint)
    for other in others:
        if (own := text_start(other, sizes.start_token)) != start:
            names = [start_name(s, t) or "nothing" for s, t in ((own, other), (start, tokenizer))]
            what = f"its tokenizer begins a text with {names[0]}, the reference's with {names[1]}"
            raise UsageError(what, where=model.name, hint=f"{hint} --no-start-token begins with neither")
    usual = texts.DEFAULT_CONTEXT if sizes.metric == CAUSAL else _MASKED_CONTEXT
    if sizes.max_tokens is not None:  # fewer are asked for than a usual window holds
        usual = max(len(start) + 2, min(usual, sizes.max_tokens))
    context = _context(sizes.context, [s for s in (model, reference) if s], usual)
    if sizes.metric == CAUSAL:
        return CausalPassages(texts.cut(ids, context, sizes.stride, sizes.max_tokens, start)), tokenizer
    if sizes.stride is not None:
        raise UsageError("windows of masked models do not overlap", where="stride")
    return masked_passages(ids, tokenizer, context, sizes.max_tokens), tokenizer


def _context(asked: int | None, subjects: list[ModelRef], usual: int) -> int:
    limits = [limit for subject in subjects if (limit := subject.longest)]
    limit = min(limits, default=None)
    if asked is None:
        return usual if limit is None else min(usual, limit)
    if limit is not None and asked > limit:
        raise UsageError(f"the model takes at most {limit} tokens, not {asked}", where="context")
    return asked


@contextmanager
def _workspace(cache_dir: str | Path | None) -> Iterator[Path]:
    if cache_dir is not None:
        folder = real_path(cache_dir)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="bitfold-eval-") as temporary:
            yield Path(temporary)


def _outcome(
    judged: ModelRef,
    against: ModelRef | None,
    setting: Setting,
    cache_dir: str | Path | None,
    how: tuple[str, int | None],
) -> Outcome:
    """What is measured, here or by others."""
    if how[0] != LOCAL:
        with open_executor(*how) as executor:
            return score_together(judged, against, setting, executor)
    with _workspace(cache_dir) as folder, within_memory(setting.device):
        return run_both(judged, against, setting, folder)


def _file_facts(judged: ModelRef) -> dict[str, Any]:
    if judged.path is None:
        return {"size": None, "bpw_whole": None}
    size = sum(f.stat().st_size for f in weight_files(judged.path))
    return {"size": size, "bpw_whole": 8 * size / max(1, inspect(judged.path).numel)}


def _summary(scores: Scores, lost: list[float] | None, passages: Passages, facts: dict[str, Any]) -> Evaluation:
    tokens, kl = passages.total, scores.divergences
    read = tokens if facts["metric"] == MASKED else len(passages) * passages.context
    return Evaluation(
        perplexity=perplexity(scores.nll, tokens),
        reference_perplexity=None if lost is None else perplexity(math.fsum(lost), tokens),
        kl_mean=None if kl is None else float(kl.mean(dtype=np.float64)),
        kl_median=None if kl is None else float(np.median(kl)),
        kl_p99=None if kl is None else float(np.quantile(kl, 0.99)),
        kl_max=None if kl is None else float(kl.max()),
        top1=None if kl is None else scores.agreements / tokens,
        top5=None if kl is None else scores.shared / (TOP * tokens),
        tokens=tokens,
        windows=len(passages),
        context=passages.context,
        tokens_per_second=read / max(scores.seconds, 1e-9),
        peak_memory=peak_memory(),
        **facts,
    )
