"""The report as one HTML file that opens without a network: texts, tables, charts, and the library that draws them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from bitfold.errors import CheckpointError
from bitfold.evaluation.comparison import Candidate
from bitfold.recipes.recipe import Recipe, Rule
from bitfold.reporting.charts import Plot, plots
from bitfold.reporting.data import ReportData, RunData, TensorFacts
from bitfold.reporting.interactive import figure, library
from bitfold.system.outputs import real_path, try_file
from bitfold.system.progress import duration
from bitfold.system.units import size_text
from bitfold.version import __version__

# Nothing is fetched, whatever a model's name or text may contain. Plotly styles elements itself.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_DIGITS = 4


def check_output(output: str | Path) -> None:
    """To be asked before anything is measured.

    Raises:
        UsageError: plotly is not installed, or the file has no folder to be in.
        CheckpointError: the file cannot be written.
    """
    library()
    try_file(output)


def write_report(data: ReportData, output: str | Path) -> Path:
    """Write the page.

    Raises:
        UsageError: plotly is not installed.
        CheckpointError: the file cannot be written.
    """
    path = real_path(output)
    text = page(data)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot be written: {error}", where=str(path)) from error
    return path


def page(data: ReportData) -> str:
    """The whole document."""
    title = f"bitfold report: {', '.join(run.name for run in data.runs)}"
    sections = [*_sections(data)]
    links = "".join(f'<a href="#{key}">{escape(name)}</a>' for key, name, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{escape(name)}</h2>{content}</section>' for key, name, content in sections)
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return "".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f'<title>{escape(title)}</title><link rel="icon" href="data:,">',
            f"<style>{_asset('page.css')}</style></head><body>",
            f'<header><h1>{escape(title)}</h1><button id="theme" type="button">dark</button></header>',
            f'<nav aria-label="sections">{links}</nav><main>{body}</main>',
            f"<footer>Made {made} by bitfold {escape(__version__)}.</footer>",
            f"<script>{library()}</script><script>{_asset('page.js')}</script></body></html>\n",
        ]
    )


def _asset(name: str) -> str:
    return (files("bitfold.reporting") / name).read_text(encoding="utf-8")


def _sections(data: ReportData) -> Iterator[tuple[str, str, str]]:
    """(id, title, HTML) of each."""
    drawn = {plot.key: plot for plot in plots(data)}
    yield "summary", "Summary", _summary(data)
    for key in ("pareto", "sizes", "layers", "outliers"):
        if key in drawn:
            yield key, drawn[key].title, _plot(drawn[key])
    if data.samples:
        yield "samples", "What they write", _samples(data)
    yield "tensors", "Tensor by tensor", _tensors(data)
    yield "kept", "What was not quantized, and why", _kept(data)
    yield "recipe", "Recipe", "".join(_recipe(run) for run in data.runs)
    yield "environment", "Environment and seeds", _environment(data)


def _plot(plot: Plot) -> str:
    """A chart, its figures as JSON beside it, and a choice of views if there are several."""
    figures = json.dumps({name: figure(chart) for name, chart in plot.views.items()}, separators=(",", ":"))
    figures = figures.replace("</", "<\\u002f")  # a name must not end the script
    options = "".join(f"<option>{escape(name)}</option>" for name in plot.views)
    choice = f'<label>View <select data-plot="{plot.key}">{options}</select></label>' if len(plot.views) > 1 else ""
    label = escape(plot.title, quote=True)
    return (
        f"<p>{escape(plot.caption)}</p>{choice}"
        f'<div class="plot" id="plot-{plot.key}" role="img" aria-label="{label}"></div>'
        f'<script type="application/json" id="data-{plot.key}">{figures}</script>'
    )


def _number(value: float | None, digits: int = _DIGITS) -> tuple[str, str]:
    """What is shown, and what is sorted by."""
    return ("", "") if value is None else (f"{value:#.{digits}g}".rstrip("."), repr(float(value)))


def _table(key: str, caption: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, filtered: bool) -> str:
    """A table whose headers sort; cells are texts, or (text, sort key) pairs for numbers."""
    heads = "".join(f'<th scope="col"><button type="button">{escape(c)}</button></th>' for c in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    search = (
        f'<label class="filter">Filter <input type="search" data-table="{key}" placeholder="name, format, ..."></label>'
        f'<span class="count" id="count-{key}" aria-live="polite">{len(rows)} rows</span>'
    )
    return (
        f"{search if filtered else ''}"
        f'<div class="scroll" role="region" aria-label="{escape(caption, quote=True)}" tabindex="0">'
        f'<table id="table-{key}"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return f'<td class="number" data-sort="{escape(value[1], quote=True)}">{escape(value[0])}</td>'
    return f"<td>{escape(str(value))}</td>"


def _summary(data: ReportData) -> str:
    measured = {run.name: run for run in data.comparison.runs} if data.comparison else {}
    rows = [_summary_row(run, measured.get(run.name)) for run in data.runs]
    columns = ("run", "formats", "size", "bits/weight", "of all", "KL mean", "KL median", "KL 99 %",
               "perplexity", "same top", "top 5 shared")  # fmt: skip
    return _setting(data) + _table("summary", "Runs", columns, rows, filtered=False)


def _summary_row(run: RunData, measured: Candidate | None) -> list[Any]:
    found = run.inspection
    formats = ", ".join(t.format for t in found.totals() if t.quantized)
    row = [run.name, formats, (size_text(found.nbytes), str(found.nbytes))]
    row += [_number(found.bpw_quantized), _number(found.bpw)]
    if measured is None:
        return [*row, *[("", "")] * 6]
    row += [_number(getattr(measured, key)) for key in ("kl_mean", "kl_median", "kl_p99", "perplexity")]
    return [*row, *((f"{share:.1%}", str(share)) for share in (measured.top1, measured.top5))]


def _setting(data: ReportData) -> str:
    if data.comparison is None:
        return f'<p class="warning">No loss is shown: {escape(data.why_not)}</p>'
    s, perplexity = data.comparison.setting, data.comparison.reference_perplexity
    kind = "pseudo-perplexity" if s["metric"] == "masked" else "perplexity"
    text = (
        f"Measured against {s['reference']} ({kind} {perplexity or 0:.2f}) on {s['tokens']} predicted tokens of"
        f" {s['text']}, context {s['context']}, computed in {s['dtype']}. KL in nats a token."
    )
    return f"<p>{escape(text)}</p>"


def _samples(data: ReportData) -> str:
    parts = ["<p>Greedy continuations of the same prompts, side by side.</p>"]
    for prompt, texts in data.samples:
        cells = "".join(
            f'<figure><figcaption>{escape(who)}</figcaption><p lang="">{escape(text.strip())}</p></figure>'
            for who, text in texts
        )
        parts.append(f'<h3 class="prompt">{escape(prompt)} …</h3><div class="samples">{cells}</div>')
    return "".join(parts)


def _tensors(data: ReportData) -> str:
    rows = [_tensor_row(run, t) for run in data.runs for t in run.tensors if t.quantized]
    columns = ("run", "tensor", "format", "shape", "bits/weight", "weight error", "output error", "KL if swapped")
    return _table("tensors", "Quantized tensors; errors are relative square errors", columns, rows, filtered=True)


def _tensor_row(run: RunData, t: TensorFacts) -> list[Any]:
    shape = ("x".join(map(str, t.shape)), str(t.nbytes))
    numbers = (t.bpw, t.weight_error, t.output_error, t.swap_kl)
    return [run.name, t.tensor, t.format, shape, *map(_number, numbers)]


def _kept(data: ReportData) -> str:
    rows = [
        [run.name, t.tensor, t.format, (size_text(t.nbytes), str(t.nbytes)), t.note or "not a weight that is quantized"]
        for run in data.runs
        for t in run.tensors
        if not t.quantized
    ]
    return _table(
        "kept", "Tensors left as they were", ("run", "tensor", "stored as", "size", "why"), rows, filtered=True
    )


def _recipe(run: RunData) -> str:
    rules = run.inspection.recipe
    text = Recipe(tuple(Rule(**rule) for rule in rules)).dumps().rstrip() if rules else "unknown"
    return f'<h3>{escape(run.name)}</h3><pre tabindex="0">{escape(text)}</pre>'


def _environment(data: ReportData) -> str:
    facts: dict[str, dict[str, str]] = {}
    for run in data.runs:
        for key, value in _made(run).items():
            facts.setdefault(key, {})[run.name] = value
    if not facts:
        return "<p>Nothing was written down when these folders were made.</p>"
    names = [run.name for run in data.runs]
    rows = [[key, *(values.get(name, "") for name in names)] for key, values in facts.items()]
    return _table("environment", "How the runs were made", ("fact", *names), rows, filtered=False)


def _made(run: RunData) -> dict[str, str]:
    """What is known of how a folder came to be."""
    made = run.record.get("quantize", {})
    facts = {key: str(made[key]) for key in ("source", "seed") if made.get(key) is not None}
    if made.get("method"):
        facts["method, chosen by bitfold"] = made["method"]
    if made.get("seconds") is not None:
        facts["time"] = duration(made["seconds"])
    if made.get("peak_memory"):
        facts["peak memory"] = size_text(made["peak_memory"])
    if calibration := made.get("calibration"):
        facts["calibration"] = ", ".join(f"{key} {value}" for key, value in calibration.items() if value is not None)
    if acts := made.get("acts"):
        facts["activations, measured"] = (
            f"{acts['choice']}: KL {acts['kl_int8']:.4f} with int8, {acts['kl_float']:.4f} with float"
        )
    return {**facts, **run.record.get("environment", {})}
