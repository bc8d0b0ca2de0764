"""Charts for papers and READMEs: SVG, PNG or PDF by matplotlib."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitfold.errors import CheckpointError, UsageError
from bitfold.reporting.charts import Chart, Heatmap, Lines, Plot, Scatter
from bitfold.system.outputs import real_path, try_file

SUFFIXES = (".svg", ".png", ".pdf")
_COLOURS = ("#2f6fde", "#d9730d", "#1a9c6f", "#8a4fd0")
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "bitfold",  # the same picture, the same bytes
    "savefig.bbox": "tight",
}


def save_plots(plots: Sequence[Plot], folder: str | Path, suffixes: Sequence[str] = (".svg", ".png")) -> list[Path]:
    """Write every view of every plot.

    Returns:
        The files, named after plot and view.
    """
    folder, files = Path(folder), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot be made: {error}", where=str(folder)) from error
    for plot in plots:
        for view, chart in plot.views.items():
            name = plot.key if len(plot.views) == 1 else f"{plot.key}-{_slug(view)}"
            for suffix in suffixes:
                files.append(save_chart(chart, folder / f"{name}{suffix}"))
    return files


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def check_picture(path: str | Path) -> None:
    """To be asked before anything is measured.

    Raises:
        UsageError: another suffix than .svg, .png, .pdf, or no folder to be in.
        CheckpointError: the file cannot be written.
    """
    if (suffix := Path(path).suffix) not in SUFFIXES:
        raise UsageError(f"unknown kind of picture {suffix!r}", where=str(path), hint=" or ".join(SUFFIXES))
    try_file(path)


def save_chart(chart: Chart, path: str | Path) -> Path:
    """Draw one chart into a file; its suffix says how.

    Raises:
        UsageError: another suffix than .svg, .png, .pdf; or matplotlib is not installed.
        CheckpointError: the file cannot be written.
    """
    check_picture(path)
    path = real_path(path)
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("pictures need matplotlib", hint="pip install 'bitfold[report]'") from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        _draw(figure, chart)
        when = {"Date": None} if path.suffix == ".svg" else {"CreationDate": None} if path.suffix == ".pdf" else {}
        try:
            figure.savefig(path, dpi=144, metadata=when)
        except OSError as error:
            raise CheckpointError(f"cannot be written: {error}", where=str(path)) from error
    return path


def _draw(figure: Any, chart: Chart) -> None:
    axes = figure.subplots()
    if isinstance(chart, Scatter):
        _scatter(axes, chart)
    elif isinstance(chart, Heatmap):
        _heat_map(figure, axes, chart)
    elif isinstance(chart, Lines):
        for colour, (name, values) in zip(_COLOURS, chart.series.items(), strict=False):
            axes.plot(chart.x, values, marker="o", markersize=3, label=name, color=colour)
        axes.set(xlabel=chart.x_label, ylabel=chart.y_label, yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    else:
        left = [0.0] * len(chart.names)
        for colour, (name, values) in zip(_COLOURS, chart.parts.items(), strict=False):
            axes.barh(chart.names, values, left=left, label=name, color=colour, height=0.6)
            left = [a + b for a, b in zip(left, values, strict=True)]
        axes.invert_yaxis()
        axes.set(xlabel=chart.x_label)
        axes.legend(frameon=False)


def _scatter(axes: Any, chart: Scatter) -> None:
    front = [p for p in chart.points if p.emphasis]
    axes.plot([p.x for p in front], [p.y for p in front], linestyle=":", color=_COLOURS[0], zorder=1)
    for p in chart.points:
        face = _COLOURS[0] if p.emphasis else "white"
        axes.scatter([p.x], [p.y], s=42, color=face, edgecolors=_COLOURS[0], zorder=2)
        axes.annotate(p.label, (p.x, p.y), xytext=(0, 7), textcoords="offset points", ha="center")
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label, yscale="log")
    axes.margins(x=0.12, y=0.15)
    axes.grid(alpha=0.3)


def _heat_map(figure: Any, axes: Any, chart: Heatmap) -> None:
    from matplotlib.colors import LogNorm, Normalize

    figure.set_size_inches(2.2 + 0.62 * len(chart.columns), max(3.2, 1.6 + 0.13 * len(chart.rows)))
    low, high = chart.limits
    norm = LogNorm(low, high) if chart.log and low < high else Normalize(low, high if high > low else low + 1)
    values = [[math.nan if v is None else v for v in row] for row in chart.values]
    image = axes.imshow(values, aspect="auto", cmap="cividis", norm=norm)
    axes.set_xticks(range(len(chart.columns)), chart.columns, rotation=45, ha="right")
    step = -(-len(chart.rows) // 16)
    axes.set_yticks(range(0, len(chart.rows), step), chart.rows[::step])
    axes.set(ylabel="layer")
    figure.colorbar(image, ax=axes, label=chart.unit)
