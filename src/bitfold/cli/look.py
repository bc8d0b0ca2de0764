"""`bitfold inspect` and `bitfold formats`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bitfold.cli.app import Json, Revision, app, print_json
from bitfold.errors import UsageError

ActivationsOption = Annotated[
    str | None,
    typer.Option(
        help="Look for outliers in the activations under this text: a file, a Hub data set, or `default`."
        " Several models may be named."
    ),
]


@app.command()
def inspect(
    model: Annotated[
        list[str],
        typer.Argument(help="A model folder, a GGUF file, or a Hub repository (org/name).", show_default=False),
    ],
    activations: ActivationsOption = None,
    context: Annotated[int, typer.Option(help="With --activations: tokens of a window.", min=2)] = 512,
    max_tokens: Annotated[int, typer.Option(help="With --activations: tokens to read.", min=2)] = 4096,
    dtype: Annotated[str, typer.Option(help="With --activations: of the arithmetic, as in `eval`.")] = "float32",
    start_token: Annotated[
        bool, typer.Option("--start-token/--no-start-token", help="With --activations: as in `eval`.")
    ] = True,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """List what is in a checkpoint: format, shape, bits and bytes of each tensor; or find its outliers."""
    if activations is not None:
        sizes = {"context": context, "max_tokens": max_tokens, "dtype": dtype, "revision": revision}
        sizes["start_token"] = start_token
        _outliers(model, activations, sizes, json=json)
        return
    if len(model) != 1:
        raise UsageError("one checkpoint at a time", where="MODEL", hint="several only with --activations")
    from bitfold.checkpoints.hub.fetch import resolve
    from bitfold.checkpoints.inspection import inspect as run

    result = run(resolve(model[0], revision=revision))
    if json:
        print_json(result.to_dict())
        return
    from bitfold.cli.tables import show_inspection

    show_inspection(result)


def _outliers(models: list[str], text: str, sizes: dict[str, Any], *, json: bool) -> None:
    from bitfold.evaluation.outliers import find_outliers

    found = sorted((find_outliers(model, text, **sizes) for model in models), key=lambda o: o.parameters)
    if json:
        print_json({"models": [o.to_dict() for o in found]})
        return
    from bitfold.cli.outliers import show_outliers, show_trend

    for outliers in found:
        show_outliers(outliers)
    if len(found) > 1:
        show_trend(found)


@app.command()
def formats(json: Json = False) -> None:
    """List the number formats: range, levels, exact bits per weight, error on Gaussian weights."""
    from bitfold.methods.gaussian import format_table

    rows = format_table()
    if json:
        print_json({"formats": [row.to_dict() for row in rows]})
        return
    from bitfold.cli.tables import show_formats

    show_formats(rows)
