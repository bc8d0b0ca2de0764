"""`bitfold quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitfold.cli.app import Json, Revision, app, print_json
from bitfold.errors import UsageError
from bitfold.units import parse_size


@app.command()
def quantize(
    model: Annotated[
        str,
        typer.Argument(help="A model folder, a GGUF file, or a Hub repository (org/name).", show_default=False),
    ],
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="Folder to write; it must not exist yet.")
    ] = None,
    bits: Annotated[int | None, typer.Option("--bits", "-b", help="1 to 8: integers of so many bits.")] = None,
    format: Annotated[
        str | None, typer.Option("--format", "-f", help="A number format by name instead, see `bitfold formats`.")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Weights of a row that share a scale; -1: the whole row.")
    ] = None,
    fit: Annotated[
        str | None, typer.Option(help="How scales are chosen: absmax, minmax, mse (default) or hqq.")
    ] = None,
    solver: Annotated[
        str,
        typer.Option(help="How codes are chosen: rtn (nearest), or ldlq (error feedback, calibrated on text)."),
    ] = "rtn",
    act: Annotated[str, typer.Option(help="Activations at run time: float, or int8 (quantized per token).")] = "float",
    ignore: Annotated[
        list[str] | None, typer.Option(help="Tensors to keep as they are: a name, a glob or re:PATTERN. Repeatable.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A TOML file of rules, tensor by tensor.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    seed: Annotated[int, typer.Option(help="Of random numbers; the same seed gives the same bytes.")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Size at which a new file is begun.")] = "4GB",
    revision: Revision = None,
    upload_repo: Annotated[
        str | None, typer.Option(help="Publish the folder as this Hub repository when it is complete.")
    ] = None,
    json: Json = False,
) -> None:
    """Quantize a model into a new folder, one tensor in memory at a time."""
    if output_dir is None and not dry_run:
        raise UsageError("say where to write", where="--output-dir", hint="or try --dry-run first")
    shard_bytes = parse_size(max_shard_size, where="--max-shard-size")
    from bitfold.driver import quantize as run

    report = run(
        model,
        output_dir or Path("unused"),
        bits=bits,
        format=format,
        group_size=group_size,
        fit=fit,
        solver=solver,
        act=act,
        ignore=ignore or (),
        recipe=recipe,
        dry_run=dry_run,
        seed=seed,
        revision=revision,
        upload_repo=upload_repo,
        max_shard_bytes=shard_bytes,
    )
    if json:
        print_json(report.to_dict())
        return
    from bitfold.cli.tables import show_quantized

    show_quantized(report, tensors=tensors)
