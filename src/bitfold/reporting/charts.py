"""What is drawn, without saying by whom: `interactive` draws it for browsers, `pictures` for papers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bitfold.evaluation.comparison import Comparison
from bitfold.reporting.data import ReportData, RunData

Cells = tuple[tuple[float | None, ...], ...]
_LAYER = re.compile(r"^(.*?)\.(\d+)\.(.+)$")
BASIS_NAMES = {"none": "as it is", "hadamard": "after Hadamard", "smooth": "after SmoothQuant"}
STATISTICS = {"ratio": "largest / median magnitude", "kurtosis": "kurtosis", "largest": "largest magnitude"}


@dataclass(frozen=True)
class Point:
    """A labelled point; `emphasis` puts it on the line of the best."""

    x: float
    y: float
    label: str
    detail: str
    emphasis: bool


@dataclass(frozen=True)
class Scatter:
    """Points over two axes, the vertical one logarithmic."""

    x_label: str
    y_label: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Heatmap:
    """Rows of layers, columns of projections; None: nothing there.

    The colour is logarithmic where `log`, and spans `limits`, from the smallest to the largest value shown.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Cells
    unit: str
    log: bool
    limits: tuple[float, float]


@dataclass(frozen=True)
class Lines:
    """Series over the layers of a model, on a logarithmic axis."""

    x: tuple[int, ...]
    series: Mapping[str, tuple[float, ...]]
    x_label: str
    y_label: str


@dataclass(frozen=True)
class Bars:
    """Stacked horizontal bars, one for each name."""

    names: tuple[str, ...]
    parts: Mapping[str, tuple[float, ...]]
    x_label: str


Chart = Scatter | Heatmap | Lines | Bars


@dataclass(frozen=True)
class Plot:
    """A chart in one or more views, of which the reader picks one.

    Args:
        key: for element ids and file names.
        title, caption: for people.
        views: by name.
    """

    key: str
    title: str
    caption: str
    views: Mapping[str, Chart]


def plots(data: ReportData) -> list[Plot]:
    """Everything that the data has enough for."""
    found = [_sizes(data.runs)]
    if data.comparison is not None:
        found.insert(0, pareto_plot(data.comparison))
    if views := dict(_heat_maps(data.runs)):
        caption = "Each cell is a tensor: the row is its layer, the column its place in the layer."
        found.append(Plot("layers", "Where the bits are, and where the damage sits", caption, views))
    found += _outlier_plots(data)
    return found


def pareto_plot(comparison: Comparison) -> Plot:
    """Whole-file size against mean KL divergence."""
    points = tuple(
        Point(
            run.size / 1e6,
            max(run.kl_mean, 1e-9),
            run.name,
            f"{run.size / 1e6:.1f} MB, {run.bpw_whole:.3f} bits/weight in the whole file, KL {run.kl_mean:.4g},"
            f" perplexity {run.perplexity:.2f}, same top token {run.top1:.1%}",
            run.front,
        )
        for run in comparison.runs
    )
    caption = (
        f"KL divergence from {comparison.setting['reference']} over {comparison.setting['tokens']} tokens of"
        f" {comparison.setting['text']}. On the line: nothing smaller is as close. Lower left is better."
    )
    chart = Scatter("weight files, MB", "KL divergence, nats a token", points)
    return Plot("pareto", "Size against loss", caption, {"size against loss": chart})


def _sizes(runs: Sequence[RunData]) -> Plot:
    names, quantized, kept = [], [], []
    if originals := [before for run in runs if (before := run.bytes_before)]:
        packed, whole = max(originals, key=lambda pair: pair[1])
        names, quantized, kept = ["original"], [packed / 1e6], [(whole - packed) / 1e6]
    for run in runs:
        names.append(run.name)
        packed = sum(t.nbytes for t in run.inspection.tensors if t.quantized)
        quantized.append(packed / 1e6)
        kept.append((run.inspection.nbytes - packed) / 1e6)
    parts = {"weights that are quantized": tuple(quantized), "kept as they were": tuple(kept)}
    caption = "Bytes of the tensors, scales and zero points counted."
    return Plot("sizes", "Size before and after", caption, {"sizes": Bars(tuple(names), parts, "MB")})


def _heat_maps(runs: Sequence[RunData]) -> Iterator[tuple[str, Heatmap]]:
    """A view for each run and each number that is known of its quantized tensors."""
    for key, title, unit in (
        ("output_error", "output error", "relative square error"),
        ("weight_error", "weight error", "relative square error"),
        ("swap_kl", "sensitivity: KL when only this tensor is swapped", "nats a token"),
        ("bpw", "bits per weight", "bits per weight"),
    ):
        for run in runs:
            cells = {t.tensor: v for t in run.tensors if t.quantized and (v := getattr(t, key)) is not None}
            if chart := heat_map(cells, unit, log=key != "bpw"):
                yield f"{title}: {run.name}", chart


def heat_map(cells: Mapping[str, float], unit: str, *, log: bool) -> Heatmap | None:
    """Numbers by tensor name as layers x projections, attention first; None when no name has a layer number."""
    at: dict[tuple[int, str], float] = {}
    for name, value in cells.items():
        if match := _LAYER.match(name):
            at.setdefault((int(match[2]), match[3].removesuffix(".weight")), value)
    rows = sorted({row for row, _ in at})
    columns = sorted(dict.fromkeys(column for _, column in at), key=lambda column: "att" not in column)
    values = tuple(tuple(_shown(at.get((row, column)), log) for column in columns) for row in rows)
    shown = [v for row in values for v in row if v is not None]
    limits = (min(shown), max(shown)) if shown else (1e-6, 1.0)
    return Heatmap(tuple(map(str, rows)), tuple(columns), values, unit, log, limits) if at else None


def _shown(value: float | None, log: bool) -> float | None:
    """What a cell shows; zero has no place on a logarithmic scale."""
    return None if value is None or not math.isfinite(value) or (log and value <= 0) else value


def _outlier_plots(data: ReportData) -> Iterator[Plot]:
    for outliers in data.outliers:
        views: dict[str, Chart] = {}
        for key, label in STATISTICS.items():
            for place, inputs in _by_place(outliers["inputs"]).items():
                x = tuple(layer for layer, _ in inputs)
                bases = inputs[0][1][key]
                series = {BASIS_NAMES[b]: tuple(max(i[key][b], 1e-9) for _, i in inputs) for b in bases}
                views[f"{label}: input of {place}"] = Lines(x, series, "layer", label)
        if views:
            caption = (
                f"Inputs of the linear layers of {outliers['model']}, under {outliers['tokens']} tokens of"
                f" {outliers['text']}. {outliers['systematic']} of {outliers['hidden']} hidden dimensions are outlier"
                " features in the sense of LLM.int8() (beyond 6 in a quarter of the layers and 6 % of the positions)."
            )
            yield Plot("outliers", "Outliers among the activations", caption, views)


def _by_place(inputs: Sequence[Mapping[str, object]]) -> dict[str, list[tuple[int, Mapping[str, dict[str, float]]]]]:
    """Inputs by their place in a layer, each with the number of the layer."""
    found: dict[str, list[tuple[int, Mapping[str, dict[str, float]]]]] = {}
    for one in inputs:
        layers: Sequence[str] = one["layers"]  # type: ignore[assignment]
        if match := _LAYER.match(layers[0] + "."):
            place = ", ".join(layer.rpartition(".")[2] for layer in layers)
            found.setdefault(place, []).append((int(match[2]), one))  # type: ignore[arg-type]
    return found
