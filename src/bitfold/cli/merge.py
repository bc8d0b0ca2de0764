"""`bitfold merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitfold.cli.app import Json, app, print_json
from bitfold.system.units import parse_size


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="The folder that the adapter was trained on.")],
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    data: Annotated[str, typer.Option("--data", "-d", help="The text that it was trained on.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder to write; it must not exist yet.")],
    text_column: Annotated[
        str | None,
        typer.Option(help="The column of the data that holds the text or the messages.", show_default=False),
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Ceiling on the resident memory of the process, such as 4GB.", show_default=False)
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew, whatever an interrupted run has finished already.")
    ] = False,
    json: Json = False,
) -> None:
    """Round base + adapter into the base's formats again, and measure what that cost on text held out."""
    ceiling = None if max_memory is None else parse_size(max_memory, where="--max-memory")
    from bitfold.run.merging import merge as run
    from bitfold.run.merging import say_what_came_of_it
    from bitfold.text.documents import with_column

    text = with_column(data, text_column) or data
    found = run(base, adapter, output_dir, text, max_memory=ceiling, restart=restart)
    if json:
        print_json(found.to_dict())
        return
    print(say_what_came_of_it(found))
