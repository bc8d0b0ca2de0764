"""Several quantized folders of one model: which of them nobody beats at their size?"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bitfold.checkpoints.inspection import inspect
from bitfold.errors import UsageError
from bitfold.evaluation import evaluate
from bitfold.models.model_ref import ModelRef, weight_files
from bitfold.records.record import add_to_record, read_record

SETTING = ("reference", "metric", "text", "start_token", "context", "tokens", "dtype", "stride")
_MEASURED = ("perplexity", "kl_mean", "kl_median", "kl_p99", "top1", "top5", "tokens_per_second")


@dataclass(frozen=True)
class Candidate:
    """One folder.

    Args:
        name: short, unique among the runs.
        path: the folder.
        size: bytes of its weight files.
        bpw: stored bits per weight over the quantized tensors; None when none is.
        bpw_whole: bits of the weight files for each weight of the model.
        perplexity, kl_mean, kl_median, kl_p99, top1, top5, tokens_per_second: see `Evaluation`.
        front: no other run is both at most as large and at most as far from the reference (mean KL).
    """

    name: str
    path: str
    size: int
    bpw: float | None
    bpw_whole: float
    perplexity: float
    kl_mean: float
    kl_median: float
    kl_p99: float
    top1: float
    top5: float
    tokens_per_second: float
    front: bool = False


@dataclass(frozen=True)
class Comparison:
    """Runs measured in the same setting, smallest first.

    Args:
        setting: what was measured on: reference, metric, text, start token, context, tokens, dtype, stride.
        reference_perplexity: of the original.
        runs: the folders.
    """

    setting: Mapping[str, Any]
    reference_perplexity: float | None
    runs: tuple[Candidate, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        reference = {"reference_perplexity": self.reference_perplexity}
        return {**self.setting, **reference, "runs": [asdict(run) for run in self.runs]}


def compare(
    folders: Sequence[str | Path], reference: str | Path | None = None, text: str | None = None, **options: Any
) -> Comparison:
    """Put quantized folders of one model side by side.

    Args:
        folders: local folders or Hub repositories.
        reference: the original; all runs are then measured now. None: what `bitfold eval --save` left in the folders is
            used, and must have been measured in the same setting.
        text: see `evaluate`; only with a reference.
        options: for `evaluate`: context, stride, max_tokens, batch, dtype, cache_dir, start_token; and `save`: keep the
            numbers.

    Raises:
        UsageError: no folders, or numbers that are missing or cannot be compared.
        BitfoldError: see `evaluate`.
    """
    if not folders:
        raise UsageError("there is nothing to compare")
    found = [ModelRef.of(folder) for folder in folders]
    paths = [subject.path for subject in found if subject.path is not None]
    if reference is not None:
        evaluations = _measure(paths, reference, text, options)
    elif text is not None:
        raise UsageError("a text to measure on needs a reference", where="--text", hint="give --reference")
    else:
        evaluations = _recorded(paths)
    runs = [_run(name, path, e) for name, path, e in zip(short_names(paths), paths, evaluations, strict=True)]
    first = evaluations[0]
    setting = {key: first.get(key) for key in SETTING}
    return Comparison(setting, first.get("reference_perplexity"), tuple(pareto(runs)))


def _measure(
    paths: Sequence[Path], reference: str | Path, text: str | None, options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    save, asked = options.get("save", False), {k: v for k, v in options.items() if k != "save"}
    known = {"reference": Path(reference).name, "dtype": asked.get("dtype", "float32"), "stride": asked.get("stride")}
    evaluations = []
    with tempfile.TemporaryDirectory(prefix="bitfold-compare-") as temporary:
        asked["cache_dir"] = asked.get("cache_dir") or temporary
        for path in paths:
            result = {**evaluate(path, reference, text, **asked).to_dict(), **known}
            evaluations.append(result)
            if save:
                add_to_record(path, "evaluations", result)
    return evaluations


def _setting(evaluation: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(evaluation.get(key) for key in SETTING)


def _recorded(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The evaluation of each folder in the setting that all share; the one with most tokens if there are several."""
    stored: list[dict[tuple[Any, ...], dict[str, Any]]] = []
    for path in paths:
        known = [e for e in read_record(path).get("evaluations", []) if e.get("kl_mean") is not None]
        if not known:
            hint = "give --reference, or measure it first: bitfold eval FOLDER --reference ORIGINAL --save"
            raise UsageError("nothing was measured against a reference yet", where=str(path), hint=hint)
        stored.append({_setting(e): e for e in known})
    shared = [key for key in stored[0] if all(key in other for other in stored)]
    if not shared:
        hint = "give --reference to measure all of them now"
        raise UsageError("the runs were measured on different texts or in different ways", hint=hint)
    best = max(shared, key=lambda key: stored[0][key]["tokens"])
    return [evaluations[best] for evaluations in stored]


def _run(name: str, path: Path, evaluation: Mapping[str, Any]) -> Candidate:
    size = sum(f.stat().st_size for f in weight_files(path))
    found = inspect(path)
    measured: dict[str, Any] = {key: float(evaluation[key]) for key in _MEASURED}
    return Candidate(name, str(path), size, found.bpw_quantized, 8 * size / max(1, found.numel), **measured)


def short_names(paths: Sequence[Path]) -> list[str]:
    """Last parts of the paths, as many as it takes to tell them apart; the same folder twice gets a number."""
    parts = [path.resolve().parts for path in paths]
    names = ["/".join(p[-1:]) for p in parts]
    for depth in range(2, max(len(p) for p in parts) + 1):
        if len(set(names)) == len(names):
            break
        names = ["/".join(p[-depth:]) if names.count(n) > 1 else n for p, n in zip(parts, names, strict=True)]
    return [f"{n} ({names[:i].count(n) + 1})" if names.count(n) > 1 else n for i, n in enumerate(names)]


def pareto(runs: Sequence[Candidate]) -> list[Candidate]:
    """The runs, smallest first, those that no other beats marked as the front."""

    def beaten(run: Candidate) -> bool:
        return any(
            other.size <= run.size
            and other.kl_mean <= run.kl_mean
            and (other.size, other.kl_mean) != (run.size, run.kl_mean)
            for other in runs
        )

    return sorted((replace(run, front=not beaten(run)) for run in runs), key=lambda run: (run.size, run.kl_mean))
