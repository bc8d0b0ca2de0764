"""`bitfold bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bitfold.cli.app import Json, Revision, app, print_json
from bitfold.errors import ModelError, UsageError

if TYPE_CHECKING:
    from torch import nn

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
    from bitfold.engine.opening import held_bytes
    from bitfold.engine.shapes import random_model
    from bitfold.engine.speed import measure
    from bitfold.system import native

    loaded = _loaded(model, revision) if shape is None else random_model(shape, format, embedding)
    try:
        found = measure(
            loaded,
            threads=threads or sorted({1, native.threads()}),
            sequences=sequences or [1],
            cache=cache,
            prompt=prompt_tokens,
            tokens=tokens,
            turns=turns,
        )
    except Unsupported as reason:
        raise ModelError(f"the engine does not run it: {reason}", where=str(model or shape)) from reason
    if json:
        print_json(
            {
                "model": model or shape,
                "weight_bytes": held_bytes(loaded),
                "speeds": [speed.to_dict() for speed in found],
            }
        )
        return
    for speed in found:
        print(_line(speed))
    print(_memory(held_bytes(loaded), found))


def _loaded(model: str | None, revision: str | None) -> nn.Module:
    from bitfold.engine.opening import load_model
    from bitfold.models.model_ref import ModelRef

    ref = ModelRef.of(str(model), revision=revision)
    ref.require_causal("only causal language models generate text")
    return load_model(ref, None)


def _memory(weights: int, speeds: list[Speed]) -> str:
    from bitfold.system.units import size_text

    most = max(speeds, key=lambda speed: speed.cache_bytes + speed.working_bytes)
    parts = (("weights", weights), ("keys and values", most.cache_bytes), ("work", most.working_bytes))
    return "memory: " + ", ".join(f"{name} {size_text(size)}" for name, size in parts)


def _line(speed: Speed) -> str:
    size = f"{speed.token_bytes / 1e6:.0f} MB a token, {speed.share:.0%} of {speed.bandwidth / 1e9:.1f} GB/s"
    reads = f"reads {speed.prefill:.0f} tokens a second (the first after {speed.first_token:.2f} s)"
    texts = f", {speed.sequences} texts" if speed.sequences > 1 else ""
    return f"{speed.threads} threads{texts}: {reads}, writes {speed.decode:.1f} ({size})"
