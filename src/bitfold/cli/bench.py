"""`bitfold bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bitfold.cli.app import Json, Revision, app, print_json
from bitfold.errors import ModelError, UsageError

if TYPE_CHECKING:
    from bitfold.engine.speed import Speed


@app.command()
def bench(
    model: Annotated[
        str | None, typer.Argument(help="A model folder or a Hub repository (org/name).", show_default=False)
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Instead: random weights in the shape of smollm-135m, qwen-0.5b, llama-1b ...")
    ] = None,
    format: Annotated[str, typer.Option(help="With --shape: of the linear layers.")] = "int4-g64",
    embedding: Annotated[str, typer.Option(help="With --shape: of the embedding and the output head.")] = "int8",
    threads: Annotated[
        list[int] | None, typer.Option(help="Numbers of threads to try, several times; default: 1 and all.")
    ] = None,
    sequences: Annotated[
        list[int] | None, typer.Option(help="Numbers of texts to write side by side, several times; default: 1.")
    ] = None,
    cache: Annotated[
        str, typer.Option(help="Keys and values: auto, f16, bf16, int8, int4 (from a billion weights on).")
    ] = "auto",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens read at once.", min=1)] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens written one by one.", min=1)] = 64,
    turns: Annotated[int, typer.Option(help="How often; medians are shown.", min=1)] = 3,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Measure how fast the native engine reads and writes text here, beside the memory's bandwidth."""
    if (model is None) == (shape is None):
        raise UsageError("name a model, or a shape for random weights", where="MODEL, --shape")
    from bitfold.engine.decoder import Unsupported
    from bitfold.engine.opening import load_model
    from bitfold.engine.shapes import random_model
    from bitfold.engine.speed import measure
    from bitfold.models.model_ref import ModelRef
    from bitfold.system import native

    most = native.threads()
    if shape is not None:
        loaded = random_model(shape, format, embedding)
    else:
        assert model is not None
        ref = ModelRef.of(model, revision=revision)
        ref.require_causal("only causal language models generate text")
        loaded = load_model(ref, None)
    counts = threads or sorted({1, most})
    try:
        found = measure(
            loaded,
            threads=counts,
            sequences=sequences or [1],
            cache=cache,
            prompt=prompt_tokens,
            tokens=tokens,
            turns=turns,
        )
    except Unsupported as reason:
        raise ModelError(f"the engine does not run it: {reason}", where=str(model or shape)) from reason
    if json:
        print_json({"model": model or shape, "speeds": [speed.to_dict() for speed in found]})
        return
    for speed in found:
        print(_line(speed))


def _line(speed: Speed) -> str:
    size = f"{speed.token_bytes / 1e6:.0f} MB a token, {speed.share:.0%} of {speed.bandwidth / 1e9:.1f} GB/s"
    reads = f"reads {speed.prefill:.0f} tokens a second (the first after {speed.first_token:.2f} s)"
    texts = f", {speed.sequences} texts" if speed.sequences > 1 else ""
    return f"{speed.threads} threads{texts}: {reads}, writes {speed.decode:.1f} ({size})"
