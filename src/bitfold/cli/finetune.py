"""`bitfold finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitfold.cli.app import Json, Revision, app, joined, print_json
from bitfold.system.units import parse_size

AnswersOnly = Annotated[
    bool, typer.Option("--answers-only", help="Of conversations, learn only what the assistant says.")
]
Targets = Annotated[
    list[str] | None,
    typer.Option(help="A layer's name, such as q_proj; repeat it. Default: all linear layers.", show_default=False),
]


@app.command()
def finetune(
    model: Annotated[str, typer.Argument(help="A folder that `quantize` made; other models with --base-format.")],
    data: Annotated[str, typer.Option("--data", "-d", help="A file of text or data, or a Hub data set.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder of the adapter; must not exist yet.")],
    text_column: Annotated[
        str | None,
        typer.Option(help="The column of the data that holds the text or the messages.", show_default=False),
    ] = None,
    base_format: Annotated[
        str | None,
        typer.Option(help="Quantize MODEL into this format first, as OUTPUT-base.", show_default=False),
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option(help="The original of MODEL: adapters start from what rounding lost.", show_default=False),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Times that all of the text is read.")] = 1.0,
    steps: Annotated[int | None, typer.Option(help="So many steps instead.", show_default=False)] = None,
    minutes: Annotated[float | None, typer.Option(help="So much time instead.", show_default=False)] = None,
    seqlen: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    batch: Annotated[int, typer.Option(help="Windows of a step; memory is that of one.")] = 8,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 2e-4,
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = 16,
    alpha: Annotated[float, typer.Option(help="The adapters' output counts alpha / rank times.")] = 32.0,
    target: Targets = None,
    answers_only: AnswersOnly = False,
    max_memory: Annotated[
        str | None, typer.Option(help="Ceiling on the resident memory of the process, such as 4GB.", show_default=False)
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew, whatever an interrupted run has finished already.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of adapters and the order of windows.")] = 0,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Train LoRA adapters on a quantized model; the packed weights stay as they are."""
    ceiling = None if max_memory is None else parse_size(max_memory, where="--max-memory")
    from bitfold.run.finetuning import finetune_model
    from bitfold.run.options import RunOptions
    from bitfold.text.documents import with_column
    from bitfold.training.finetune import say_what_came_of_it
    from bitfold.training.options import Finetuning

    text = with_column(data, text_column) or data
    targets = tuple(target or ["all-linear"])
    how = Finetuning(
        text, epochs, steps, minutes, seqlen, batch, rate, rank, alpha, targets, seed=seed, answers_only=answers_only
    )
    team = joined()
    options = RunOptions(seed=seed, max_memory=ceiling, restart=restart, revision=revision)
    found = finetune_model(model, output_dir, how, base_format, start_from, options, team)
    if team.rank > 0:
        return
    if json:
        print_json(found.to_dict())
        return
    print(say_what_came_of_it(found))
    base = model if base_format is None else output_dir.with_name(found.base)
    print(f"  merged: bitfold merge {base} {output_dir} --data {data} --output-dir OUT")
