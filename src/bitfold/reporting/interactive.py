"""Charts for browsers: plotly's JSON, coloured by the page (it knows whether it is light or dark)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bitfold.errors import UsageError
from bitfold.reporting.charts import Bars, Chart, Heatmap, Lines, Scatter

_ROW_HEIGHT, _BAR_HEIGHT = 14, 46


def library() -> str:
    """The JavaScript of plotly, whole: the page must open without a network.

    Raises:
        UsageError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UsageError("reports need plotly", hint="pip install 'bitfold[report]'") from error
    return str(get_plotlyjs())


def figure(chart: Chart) -> dict[str, Any]:
    """{"data", "layout", "height"}, checked by plotly; colours are names that the page replaces."""
    import plotly.graph_objects as go

    if isinstance(chart, Scatter):
        data, layout, height = _scatter(chart)
    elif isinstance(chart, Heatmap):
        data, layout, height = _heat_map(chart)
    elif isinstance(chart, Lines):
        data, layout, height = _lines(chart)
    else:
        data, layout, height = _bars(chart)
    layout["margin"] = {"l": 8, "r": 8, "t": 8, "b": 8}
    made = go.Figure(data=data, layout=layout).to_plotly_json()
    made["layout"].pop("template", None)
    return {"data": made["data"], "layout": made["layout"], "height": height}


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title, "standoff": 8}, "automargin": True, **more}


def _scatter(chart: Scatter) -> tuple[list[dict[str, Any]], dict[str, Any], int]:
    front = [p for p in chart.points if p.emphasis]
    line = {"x": [p.x for p in front], "y": [p.y for p in front], "mode": "lines", "hoverinfo": "skip",
            "line": {"dash": "dot", "width": 1.5}, "showlegend": False}  # fmt: skip
    dots = {
        "x": [p.x for p in chart.points],
        "y": [p.y for p in chart.points],
        "text": [p.label for p in chart.points],
        "customdata": [p.detail for p in chart.points],
        "mode": "markers+text",
        "textposition": "top center",
        "cliponaxis": False,
        "hovertemplate": "<b>%{text}</b><br>%{customdata}<extra></extra>",
        "marker": {"size": [12 if p.emphasis else 9 for p in chart.points],
                   "symbol": ["circle" if p.emphasis else "circle-open" for p in chart.points]},
        "showlegend": False,
    }  # fmt: skip
    width = max(p.x for p in chart.points) - min(p.x for p in chart.points)
    low, high = (f(p.x for p in chart.points) for f in (min, max))
    room = 0.18 * width or 0.1 * high
    logs = [math.log10(p.y) for p in chart.points]
    layout = {
        "xaxis": _axis(chart.x_label, range=[low - room, high + room]),
        "yaxis": _axis(chart.y_label, type="log", range=[min(logs) - 0.25, max(logs) + 0.35],
                       dtick=_log_ticks(logs), exponentformat="power"),
    }  # fmt: skip
    return [line, dots], layout, 420


def _log_ticks(logs: Sequence[float]) -> int | str:
    """plotly's `dtick`: every power of ten where the values span a few, else 1, 2, 5, 10."""
    return 1 if max(logs) - min(logs) > 2.5 else "D2"


def _heat_map(chart: Heatmap) -> tuple[list[dict[str, Any]], dict[str, Any], int]:
    z = [[_colour_value(v, chart.log) for v in row] for row in chart.values]
    low, high = (_colour_value(limit, chart.log) or 0.0 for limit in chart.limits)
    bar: dict[str, Any] = {"title": {"text": chart.unit, "side": "right"}, "thickness": 12, "outlinewidth": 0}
    if chart.log:
        ticks = range(math.floor(low), math.ceil(high) + 1)
        bar |= {"tickvals": list(ticks), "ticktext": [f"1e{t}" for t in ticks]}
    data = {
        "type": "heatmap",
        "x": list(chart.columns),
        "y": list(chart.rows),
        "z": z,
        "customdata": [list(row) for row in chart.values],
        "zmin": low,
        "zmax": high if high > low else low + 1,
        "colorscale": "Cividis",
        "colorbar": bar,
        "hoverongaps": False,
        "xgap": 1,
        "ygap": 1,
        "hovertemplate": "layer %{y}, %{x}<br><b>%{customdata:.4g}</b> " + chart.unit + "<extra></extra>",
    }
    layout = {
        "xaxis": _axis("", type="category", tickangle=-45, side="bottom", showgrid=False),
        "yaxis": _axis("layer", type="category", autorange="reversed", showgrid=False),
    }
    return [data], layout, 150 + _ROW_HEIGHT * max(len(chart.rows), 8)


def _colour_value(value: float | None, log: bool) -> float | None:
    return None if value is None else math.log10(value) if log else value


def _lines(chart: Lines) -> tuple[list[dict[str, Any]], dict[str, Any], int]:
    data = [
        {"x": list(chart.x), "y": list(values), "name": name, "mode": "lines+markers", "marker": {"size": 5},
         "hovertemplate": "%{y:.4g}"}
        for name, values in chart.series.items()
    ]  # fmt: skip
    logs = [math.log10(value) for values in chart.series.values() for value in values]
    layout = {
        "hovermode": "x unified",
        "xaxis": _axis(chart.x_label),
        "yaxis": _axis(chart.y_label, type="log", dtick=_log_ticks(logs), exponentformat="power"),
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    }
    return data, layout, 400


def _bars(chart: Bars) -> tuple[list[dict[str, Any]], dict[str, Any], int]:
    data = [
        {"type": "bar", "orientation": "h", "x": list(values), "y": list(chart.names), "name": name,
         "hovertemplate": "%{y}: %{x:.1f} " + chart.x_label + " " + name + "<extra></extra>"}
        for name, values in chart.parts.items()
    ]  # fmt: skip
    layout = {
        "barmode": "stack",
        "bargap": 0.35,
        "xaxis": _axis(chart.x_label),
        "yaxis": _axis("", autorange="reversed", type="category", showgrid=False),
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
    }
    return data, layout, 130 + _BAR_HEIGHT * len(chart.names)
