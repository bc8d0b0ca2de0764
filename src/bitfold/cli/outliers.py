"""Text for people: outliers of models."""

from __future__ import annotations

from collections.abc import Sequence

from bitfold.cli.tables import facts, table
from bitfold.evaluation.outliers import LAYER_SHARE, POSITION_SHARE, THRESHOLD, Outliers

_SHOWN = 20  # features of a model; the rest is counted


def show_outliers(o: Outliers) -> None:
    """One model: its features, the inputs of its layers, the worst weights."""
    print(f"{o.model}\n")
    rows = [
        (
            str(f.dimension),
            f"{f.layers:.0%}",
            f"{f.positions:.1%}",
            f"{f.largest:.1f}",
            "outlier" if f.systematic else "",
        )
        for f in o.features[:_SHOWN]
    ]
    table(("dimension", "of layers", "of positions", "largest", "note"), rows)
    if len(o.features) > _SHOWN:
        print(f"... and {len(o.features) - _SHOWN} more that exceed {THRESHOLD:g}")
    print()
    columns = ("input of", "beyond 6", "kurtosis", "hadamard", "smooth", "max/median", "hadamard", "smooth")
    table(columns, [_input_row(i.layers, i.beyond, (i.kurtosis, i.ratio)) for i in o.inputs])
    print()
    worst = sorted(o.weights, key=lambda w: -w.ratio["none"])[:_SHOWN]
    table(
        ("weight (largest spikes)", "kurtosis", "hadamard", "max/median", "hadamard"),
        [(w.tensor, *(f"{n[b]:.1f}" for n in (w.kurtosis, w.ratio) for b in ("none", "hadamard"))) for w in worst],
    )
    print()
    facts(
        [
            ("outlier features", f"{o.systematic} of {o.hidden} dimensions (beyond {THRESHOLD:g} in at least"
             f" {LAYER_SHARE:.0%} of layers and {POSITION_SHARE:.0%} of positions)"),
            ("they touch", f"{o.layers_affected:.0%} of layers, {o.positions_affected:.1%} of positions"),
            ("perplexity", f"{o.perplexity:.3f} on {o.tokens} tokens of {o.text}"),
            ("parameters", f"{o.parameters / 1e6:.1f} million"),
        ]
    )  # fmt: skip


def _input_row(layers: Sequence[str], beyond: int, numbers: Sequence[dict[str, float]]) -> tuple[str, ...]:
    more = "" if len(layers) == 1 else f" (+{len(layers) - 1})"
    return layers[0] + more, str(beyond), *(f"{value:.1f}" for table in numbers for value in table.values())


def show_trend(models: Sequence[Outliers]) -> None:
    """Several models, smallest first: do outliers grow with size, and as the perplexity falls?"""
    print()
    rows = [
        (o.model, f"{o.parameters / 1e6:.1f}", f"{o.perplexity:.3f}", str(o.systematic), f"{o.layers_affected:.0%}",
         f"{o.positions_affected:.1%}", f"{max(i.ratio['none'] for i in o.inputs):.1f}")
        for o in models
    ]  # fmt: skip
    table(("model", "M parameters", "perplexity", "features", "layers", "positions", "max/median"), rows)
