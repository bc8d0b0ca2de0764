"""Text for people: tables and lines of facts."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bitfold.records.run_report import totals_text
from bitfold.system.progress import duration
from bitfold.system.units import size_text

if TYPE_CHECKING:
    from bitfold.checkpoints.inspection import Inspection
    from bitfold.evaluation import EmbeddingAgreement, Evaluation
    from bitfold.evaluation.comparison import Comparison
    from bitfold.evaluation.layers import LayerErrors
    from bitfold.methods.gaussian import FormatRow
    from bitfold.records.run_report import QuantizeReport, TensorReport

_WIDE = 200  # off a terminal nothing is cut or wrapped
Facts = Iterable[tuple[str, str | None]]


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> None:
    """Print rows under headers; all but the first `left` columns are numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left or column == "note" else "right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    _console().print(table)


def facts(facts: Facts) -> None:
    known = [(name, value) for name, value in facts if value is not None]
    width = max(len(name) for name, _ in known)
    for name, value in known:
        print(f"{name:<{width}}  {value}")


def _number(value: float | None, digits: int = 3, unit: str = "") -> str | None:
    return None if value is None else f"{value:.{digits}f}{unit}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(str(n) for n in shape) or "scalar"


def show_quantized(report: QuantizeReport, *, tensors: bool) -> None:
    """What a run did, or with a dry run would do."""
    if tensors:
        table(
            ("tensor", "format", "shape", "bits/weight", "size", "error", "note"),
            map(_tensor_row, report.tensors),
            left=2,
        )
        print()
    groups: dict[str, list[TensorReport]] = {}
    for tensor in report.tensors:
        groups.setdefault(tensor.format or "kept", []).append(tensor)
    rows = []
    for name, group in groups.items():
        before, after = (sum(getattr(t, key) for t in group) for key in ("bytes_before", "bytes_after"))
        bpw = 8 * after / max(1, sum(t.numel for t in group))
        rows.append((name, str(len(group)), f"{bpw:.3f}", size_text(before), size_text(after)))
    table(("format", "tensors", "bits/weight", "before", "after"), rows)
    print()
    facts(_quantize_facts(report))


def _tensor_row(t: TensorReport) -> tuple[str, ...]:
    error = "" if t.error is None else f"{t.error:.2e}"
    return t.tensor, t.format or "kept", _shape(t.shape), f"{t.bpw:.3f}", size_text(t.bytes_after), error, t.reason


def _quantize_facts(report: QuantizeReport) -> Facts:
    change = report.bytes_before / max(1, report.bytes_after)
    yield "size", f"{size_text(report.bytes_before)} -> {size_text(report.bytes_after)} ({change:.2f}x smaller)"
    yield "bits per weight", f"{report.bpw_quantized:.3f} quantized tensors, {report.bpw_whole:.3f} whole model"
    yield "method", report.method or None
    yield "relative error", None if report.error is None else f"{report.error:.3e} of the squared weights"
    yield "time", duration(report.seconds)
    yield "peak memory", None if report.peak_memory is None else size_text(report.peak_memory) + report.under()
    if report.output is None:
        yield from _preflight_facts(report.preflight)
    yield "accounted for", totals_text(report.account) if report.account else None
    yield "not quantized", report.preflight.get("unknown")
    for text in report.preflight.get("substitutes", ()):
        yield "instead", text
    for tensor in report.flagged:
        yield "flagged", f"{tensor.tensor}: {', '.join(tensor.flags)}"
    for name in report.unread:
        yield "not read", f"{name}: a file of weights that is not part of this checkpoint"
    yield "written to", report.output or "nothing, this was a dry run"
    yield "uploaded to", report.url


def _preflight_facts(found: Mapping[str, Any]) -> Facts:
    """What a run would need, and who would load the result."""
    allowed = "" if found["allowed"] is None else f" of {size_text(found['allowed'])}"
    yield "needs memory", f"{size_text(found['peak_memory'])}{allowed}, most of it for {found['memory_for']}"
    if found["ranges"]:
        what = f"{len(found['ranges'])} layers, at most {found['columns']} at a time: less memory, some loss"
        yield "inputs in ranges", what
    yield "needs disk", size_text(found["disk_bytes"])
    yield "needs time", None if found["seconds"] is None else f"about {duration(found['seconds'])}"
    yield "would write", f"{size_text(found['output_bytes'])} of weights"
    for reason, part in found["kept"].items():
        yield "would keep", f"{part['tensors']} tensors ({size_text(part['bytes'])}): {reason}"
    if ragged := found["ragged"]:
        yield "ragged groups", f"{len(ragged)} tensors, such as {ragged[0]}: the last group of a row is shorter"
    yield from found["engines"].items()


def show_evaluation(result: Evaluation) -> None:
    """Perplexity and, against a reference, what was lost."""
    kl = result.kl_mean
    parts = f"median {result.kl_median:.5f}, 99% {result.kl_p99:.5f}" if kl is not None else ""
    facts(
        [
            ("perplexity", _number(result.perplexity, 4)),
            ("  of the reference", _number(result.reference_perplexity, 4)),
            ("KL(reference || model)", None if kl is None else f"{kl:.6f} nats a token ({parts})"),
            ("top-1 agreement", None if result.top1 is None else f"{100 * result.top1:.2f} %"),
            ("top-5 agreement", None if result.top5 is None else f"{100 * result.top5:.2f} %"),
            ("bits per weight", None if result.bpw is None else f"{result.bpw:.3f} over the quantized weights"),
            ("weight files", None if result.size is None else _files(result.size, result.bpw_whole)),
            ("tokens", f"{result.tokens} predicted, in {result.windows} windows of {result.context}"),
            ("text", result.text),
            ("start of a window", result.start_token),
            ("time", f"{duration(result.seconds)}, {result.tokens_per_second:.0f} tokens/s"),
            ("peak memory", None if result.peak_memory is None else size_text(result.peak_memory)),
        ]
    )
    for task, scores in (result.tasks or {}).items():
        print(f"{task}: {_scores(scores)}")


def _scores(scores: Mapping[str, float]) -> str:
    """Of a task: `acc 0.5000 +- 0.2887, ... (4 documents)`."""
    parts = []
    for name, value in scores.items():
        if name != "documents" and not name.endswith("_stderr"):
            error = scores.get(f"{name}_stderr")
            parts.append(f"{name} {value:.4f}" + ("" if error is None else f" +- {error:.4f}"))
    count = scores.get("documents")
    return ", ".join(parts) + ("" if count is None else f" ({count:.0f} documents)")


def _files(size: int, bpw: float | None) -> str:
    return size_text(size) if bpw is None else f"{size_text(size)}, {bpw:.3f} bits for each weight of the model"


def show_layers(result: LayerErrors) -> None:
    """What each quantized tensor lost."""
    rows = (
        (e.tensor, e.format, f"{e.bpw:.3f}", f"{e.weight_error:.3e}", _power(e.output_error), _power(e.swap_kl))
        for e in result.layers
    )
    table(("tensor", "format", "bits/weight", "weight error", "output error", "KL if swapped"), rows, left=2)
    print()
    print(f"relative square errors; outputs under {result.tokens} tokens of {result.text}")
    if result.swap_tokens:
        print(f"KL in nats a token, over {result.swap_tokens} predictions")


def _power(value: float | None) -> str:
    return "" if value is None else f"{value:.3e}"


def show_embedding(result: EmbeddingAgreement) -> None:
    """Cosines of sentence embeddings."""
    facts(
        [
            ("cosine, mean", f"{result.cosine_mean:.6f}"),
            ("cosine, smallest", f"{result.cosine_min:.6f}"),
            ("texts", str(result.texts)),
            ("time", duration(result.seconds)),
        ]
    )


def show_comparison(result: Comparison) -> None:
    """Runs, smallest first."""
    rows = (
        (
            run.name,
            size_text(run.size),
            "" if run.bpw is None else f"{run.bpw:.3f}",
            f"{run.bpw_whole:.3f}",
            f"{run.kl_mean:.5f}",
            f"{run.kl_p99:.3f}",
            f"{run.perplexity:.3f}",
            f"{100 * run.top1:.2f}",
            "best at its size" if run.front else "beaten",
        )
        for run in result.runs
    )
    columns = ("run", "size", "bits/weight", "whole file", "KL", "KL 99%", "perplexity", "top-1 %", "note")
    table(columns, rows)
    print()
    setting = result.setting
    facts(
        [
            ("reference", f"{setting['reference']}, perplexity {result.reference_perplexity or 0:.4f}"),
            ("measured on", f"{setting['tokens']} tokens of {setting['text']}, context {setting['context']}"),
        ]
    )


def show_inspection(result: Inspection) -> None:
    """Every tensor, then totals for each format."""
    rows = ((t.tensor, t.format, _shape(t.shape), f"{t.bpw:.3f}", size_text(t.nbytes), t.note) for t in result.tensors)
    table(("tensor", "format", "shape", "bits/weight", "size", "note"), rows, left=2)
    print()
    totals = ((t.format, str(t.tensors), str(t.numel), f"{t.bpw:.3f}", size_text(t.nbytes)) for t in result.totals())
    table(("format", "tensors", "weights", "bits/weight", "size"), totals)
    print()
    quantized = result.bpw_quantized
    facts(
        [
            ("checkpoint", f"{result.path} ({result.kind}, {result.model_type or 'unknown architecture'})"),
            ("weights", f"{result.numel} in {len(result.tensors)} tensors"),
            ("size", size_text(result.nbytes)),
            ("bits per weight", f"{result.bpw:.3f} whole model"),
            ("", None if quantized is None else f"{quantized:.3f} quantized tensors"),
        ]
    )


def show_formats(rows: Iterable[FormatRow]) -> None:
    """The table of formats."""
    cells = (
        (
            row.name,
            f"{row.bits:g}",
            f"{row.bpw:.5g}",
            row.bpw_exact,
            "" if row.levels is None else str(row.levels),
            f"{row.low:.5g} .. {row.high:.5g}",
            _sqnr(row.sqnr_db),
        )
        for row in rows
    )
    table(("format", "code bits", "bits/weight", "exactly", "levels", "range at scale 1", "SQNR dB"), cells)
    print()
    print("bits/weight counts scales and zero points of full groups; numbers stored once a row or tensor come on top.")
    print(
        "SQNR: signal to quantization noise on Gaussian weights in rows of 4096; scales fitted by mse, but for ggml's."
    )
    print("Other groups and scopes by name: int3-g32, int4-asym-row, fp8-e4m3-g128, nf4-g32-dq ...")


def _sqnr(value: float | None) -> str:
    if value is None:
        return "read only"
    return "exact" if value == math.inf else f"{value:.2f}"
