"""`bitfold serve`."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Annotated

import typer

from bitfold.cli.app import Json, ModelArgument, Revision, Terminated, app, print_json
from bitfold.cli.generate import Cache, Dtype, Speculate, guesses_of
from bitfold.errors import UsageError


@app.command()
def serve(
    model: ModelArgument,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0: all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0: any free one.")] = 8000,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of a text, prompt included; default: the model's, 4096 at most.", show_default=False),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Texts that are written side by side.")] = 4,
    queue: Annotated[int, typer.Option(help="Requests that may wait beside them.")] = 256,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; default: its folder's name.", show_default=False)
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="What clients must send; default: BITFOLD_API_KEY of the environment.", show_default=False),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="A web page that may ask (https://host), * for all. May be repeated.", show_default=False),
    ] = None,
    speculate: Speculate = "auto",
    cache: Cache = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Serve a model over HTTP, with OpenAI's interface, to several clients at a time."""
    try:
        from bitfold.serving.server import ServerOptions, serve
    except ImportError as error:
        missing = error.name or str(error)
        raise UsageError(f"the server needs {missing}", hint="pip install 'bitfold[serve]'") from error
    key = api_key if api_key is not None else os.environ.get("BITFOLD_API_KEY")
    kept = (cache, guesses_of(speculate), dtype, revision)
    options = ServerOptions(host, port, context, sequences, queue, name, key, tuple(allow_origin or ()), *kept)
    try:
        serve(model, options, (lambda ready: print_json(asdict(ready))) if json else None)
    except (KeyboardInterrupt, Terminated):
        return  # that is how a server ends
