"""`bitfold inspect` and `bitfold formats`."""

from __future__ import annotations

from typing import Annotated

import typer

from bitfold.cli.app import Json, Revision, app, print_json


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="A model folder, a GGUF file, or a Hub repository (org/name).", show_default=False)
    ],
    revision: Revision = None,
    json: Json = False,
) -> None:
    """List what is in a checkpoint: format, shape, bits and bytes of each tensor; totals."""
    from bitfold.checkpoints.hub import resolve
    from bitfold.inspection import inspect as run

    result = run(resolve(model, revision=revision))
    if json:
        print_json(result.to_dict())
        return
    from bitfold.cli.tables import show_inspection

    show_inspection(result)


@app.command()
def formats(json: Json = False) -> None:
    """List the number formats: range, levels, exact bits per weight, error on Gaussian weights."""
    from bitfold.evaluation.gaussian import format_table

    rows = format_table()
    if json:
        print_json({"formats": [row.to_dict() for row in rows]})
        return
    from bitfold.cli.tables import show_formats

    show_formats(rows)
