"""`bitfold distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitfold.cli.app import Json, Revision, app, joined, print_json
from bitfold.system.units import parse_size


@app.command()
def distill(
    folder: Annotated[str, typer.Argument(help="A folder that `quantize` made, or a Hub repository with one.")],
    teacher: Annotated[str, typer.Option("--teacher", "-t", help="The original that it was made from.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder to write; it must not exist yet.")],
    text: Annotated[
        str, typer.Option(help="A file of text or data, or a Hub data set; default: WikiText-2's validation split.")
    ] = "default",
    text_column: Annotated[
        str | None,
        typer.Option(help="The column of the data that holds the text or the messages.", show_default=False),
    ] = None,
    minutes: Annotated[float, typer.Option(help="Time that it may take in all.")] = 30.0,
    steps: Annotated[int | None, typer.Option(help="So many steps instead.", show_default=False)] = None,
    seqlen: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    batch: Annotated[int, typer.Option(help="Windows of a step.")] = 2,
    rate: Annotated[float, typer.Option(help="Learning rate of row scales, which are factors.")] = 4e-3,
    plain_rate: Annotated[float, typer.Option(help="Of norms and biases, times their root mean square.")] = 1e-3,
    weight_rate: Annotated[float, typer.Option(help="Of --weights, times their root mean square.")] = 2e-4,
    weights: Annotated[
        bool, typer.Option("--weights", help="In a folder that is packed in part the other layers learn, too.")
    ] = False,
    max_memory: Annotated[
        str | None, typer.Option(help="Ceiling on the resident memory of the process, such as 4GB.", show_default=False)
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew, whatever an interrupted run has finished already.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the order of windows.")] = 0,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Train the scales and norms of a quantized folder on its original's predictions; codes stay as they are."""
    ceiling = None if max_memory is None else parse_size(max_memory, where="--max-memory")
    from bitfold.text.documents import with_column
    from bitfold.training.distill import distill as run
    from bitfold.training.distill import say_what_came_of_it
    from bitfold.training.options import Distillation

    spec = with_column(text, text_column) or "default"
    how = Distillation(spec, minutes, steps, seqlen, batch, rate, plain_rate, weight_rate, seed=seed, weights=weights)
    team = joined()
    found = run(folder, teacher, output_dir, how, max_memory=ceiling, restart=restart, revision=revision, team=team)
    if team.rank > 0:
        return
    if json:
        print_json(found.to_dict())
        return
    print(say_what_came_of_it(found))
