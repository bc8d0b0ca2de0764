"""Gather what is known about quantized folders; measure what is missing when the original is at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitfold.checkpoints.inspection import Inspection, inspect
from bitfold.errors import CheckpointError, UsageError
from bitfold.evaluation.comparison import Comparison, compare, short_names
from bitfold.models.model_ref import ModelRef, is_bitfold
from bitfold.records.record import add_to_record, environment, read_record

PROMPTS = (
    "The water cycle begins when the sun heats the sea. The water",
    "Once upon a time, in a village by the mountains, there lived",
    "A list of three things to remember when you learn to cook:",
)
_SAMPLE_TOKENS = 48


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of a run: what became of it, and what that cost where it is known."""

    tensor: str
    format: str
    shape: tuple[int, ...]
    quantized: bool
    nbytes: int
    bpw: float
    note: str
    weight_error: float | None = None
    output_error: float | None = None
    swap_kl: float | None = None


@dataclass(frozen=True)
class RunData:
    """One quantized folder or GGUF file.

    Args:
        name: short, unique among the runs.
        path: the folder or file.
        inspection: what is in it.
        record: what was written down about it.
    """

    name: str
    path: Path
    inspection: Inspection
    record: Mapping[str, Any]

    @property
    def bytes_before(self) -> tuple[int, int] | None:
        """Bytes in the original of what was quantized, and of all tensors; None when the folder does not say."""
        made = self.record.get("quantize", {})
        if not made.get("bytes_before"):
            return None
        quantized = sum(t["bytes_before"] for t in made.get("tensors", []) if t.get("format") is not None)
        return int(quantized), int(made["bytes_before"])

    @property
    def tensors(self) -> list[TensorFacts]:
        """All tensors, in the order of the model."""
        made = {t["tensor"]: t for t in self.record.get("quantize", {}).get("tensors", [])}
        measured = {t["tensor"]: t for t in self.record.get("layers", {}).get("layers", [])}
        return [_facts(row, made.get(row.tensor, {}), measured.get(row.tensor, {})) for row in self.inspection.tensors]


def _facts(row: Any, made: Mapping[str, Any], measured: Mapping[str, Any]) -> TensorFacts:
    return TensorFacts(
        row.tensor,
        row.format,
        row.shape,
        row.quantized,
        row.nbytes,
        row.bpw,
        row.note or made.get("reason", ""),
        measured.get("weight_error", made.get("error") if row.quantized else None),
        measured.get("output_error", made.get("output_error")),
        measured.get("swap_kl"),
    )


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows.

    Args:
        runs: the folders.
        comparison: their sizes and losses; None when they were not measured in one setting.
        why_not: what is missing for the comparison, and what to do.
        outliers: of the originals, as `Outliers.to_dict` gives them.
    """

    runs: tuple[RunData, ...]
    comparison: Comparison | None
    why_not: str
    outliers: tuple[Mapping[str, Any], ...]

    @property
    def samples(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """For each prompt, (who, text) of the original and of the runs that have a sample of it."""
        table: dict[str, list[tuple[str, str]]] = {}
        for run in self.runs:
            for sample in run.record.get("samples", {}).get("samples", []):
                texts = table.setdefault(sample["prompt"], [("original", sample["original"])])
                texts.append((run.name, sample["text"]))
        return list(table.items())


@dataclass(frozen=True)
class Measuring:
    """What to measure where it is missing.

    Args:
        reference: the original.
        text: to evaluate on; None: the default of `evaluate`.
        options: of `evaluate`.
        swaps: tensors to swap in each folder.
        prompts: for sample generations.
    """

    reference: str
    text: str | None = None
    options: Mapping[str, Any] | None = None
    swaps: int = 0
    prompts: Sequence[str] = PROMPTS


def gather(folders: Sequence[str | Path], measuring: Measuring | None = None) -> ReportData:
    """Read the folders' records; with `measuring`, complete them first (and keep what was measured in the folders).

    Raises:
        UsageError: no folders.
        CheckpointError: a folder that bitfold did not write.
        BitfoldError: see `evaluate`, `layer_errors`, `find_outliers`.
    """
    if not folders:
        raise UsageError("there is nothing to report on")
    paths = [_folder(folder) for folder in folders]
    if measuring is not None:
        _complete(paths, measuring)
    runs = [
        RunData(n, p, inspect(p, as_model=True), read_record(p)) for n, p in zip(short_names(paths), paths, strict=True)
    ]
    comparison, why_not = None, ""
    try:
        comparison = compare(paths)
    except UsageError as error:
        why_not = str(error)
    outliers = {o["model"]: o for run in runs if (o := run.record.get("outliers"))}
    return ReportData(tuple(runs), comparison, why_not, tuple(outliers.values()))


def _folder(folder: str | Path) -> Path:
    subject = ModelRef.of(folder)
    if subject.path is None or not (is_bitfold(subject.config) or subject.packed):
        raise CheckpointError(
            "was not written by bitfold, and holds nothing packed", where=str(folder), hint="quantize it first"
        )
    return subject.path


def _complete(paths: Sequence[Path], measuring: Measuring) -> None:
    from bitfold.evaluation.layers import layer_errors
    from bitfold.evaluation.outliers import find_outliers

    start = {"start_token": (measuring.options or {}).get("start_token", True)}
    try:
        compare(paths)
    except UsageError:
        compare(paths, measuring.reference, measuring.text, save=True, **(measuring.options or {}))
    for path in paths:
        known = read_record(path).get("layers")
        if known is None or (measuring.swaps and not known.get("swap_tokens")):
            errors = layer_errors(path, measuring.reference, swaps=measuring.swaps, **start)
            add_to_record(path, "layers", errors.to_dict())
    if any("outliers" not in read_record(path) for path in paths):
        outliers = find_outliers(measuring.reference, **start).to_dict()
        for path in paths:
            add_to_record(path, "outliers", outliers)
    if missing := [path for path in paths if not _sampled(path, measuring.prompts)]:
        _sample(missing, measuring)


def _sampled(path: Path, prompts: Sequence[str]) -> bool:
    known = read_record(path).get("samples", {}).get("samples", [])
    return {sample["prompt"] for sample in known} >= set(prompts)


def _sample(paths: Sequence[Path], measuring: Measuring) -> None:
    originals = _write(measuring.reference, measuring.prompts)
    for path in paths:
        texts = _write(path, measuring.prompts)
        samples = [
            {"prompt": prompt, "original": original, "text": text}
            for prompt, original, text in zip(measuring.prompts, originals, texts, strict=True)
        ]
        add_to_record(path, "samples", {"samples": samples, "sampling": "greedy", "tokens": _SAMPLE_TOKENS})


def _write(model: str | Path, prompts: Sequence[str]) -> list[str]:
    """Greedy continuations; one model in memory at a time."""
    from bitfold.engine import Sampling, Writer

    writer = Writer.open(model, dtype="float32")
    return [writer.write(prompt, Sampling(_SAMPLE_TOKENS)).text for prompt in prompts]


__all__ = ["Measuring", "ReportData", "RunData", "TensorFacts", "environment", "gather"]
