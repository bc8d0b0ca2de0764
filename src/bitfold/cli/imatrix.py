"""`bitfold imatrix`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitfold.cli.app import Json, PreTokenizer, Revision, app, print_json


@app.command()
def imatrix(
    model: Annotated[
        str, typer.Argument(help="A model folder, a GGUF file, or a Hub repository (org/name).", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="File to write: NAME.gguf, or NAME.dat for llama.cpp's older form.",
            show_default=False,
        ),
    ],
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="A file of text or data, a Hub data set, code, or default; again, for a mix.", show_default=False
        ),
    ] = None,
    nsamples: Annotated[int, typer.Option(help="Samples of text.")] = 32,
    seqlen: Annotated[int | None, typer.Option(help="Tokens of a sample (default: 512, or what fits).")] = None,
    gradients: Annotated[
        bool | None,
        typer.Option(
            "--gradients/--no-gradients",
            help="Also measure what errors cost, for sizes (default: if the model is small).",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random numbers; the same seed gives the same bytes.")] = 0,
    pre_tokenizer: PreTokenizer = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Measure how much the inputs of each weight matter: for `convert --imatrix`, `quantize --imatrix`, llama.cpp."""
    from bitfold.calibration.options import Calibration
    from bitfold.run.importance import make_imatrix
    from bitfold.text.mixes import joined
    from bitfold.text.tokens import BUNDLED

    text = Calibration(joined(calibration) or BUNDLED, nsamples, seqlen)
    found = make_imatrix(
        model, output, text, seed=seed, gradients=gradients, revision=revision, pre_tokenizer=pre_tokenizer
    )
    costs = sum(entry.costs is not None for entry in found.entries.values())
    if json:
        facts = {"entries": len(found.entries), "with_costs": costs, "tokens": found.tokens}
        print_json({"source": model, "output": str(output), **facts})
        return
    more = "what errors cost as well" if costs else "no costs of errors: the model is large, or none were asked for"
    print(f"{output}: {len(found.entries)} tensors, {found.tokens} tokens; {more}")
