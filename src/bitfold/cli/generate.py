"""`bitfold generate` and `bitfold chat`."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from bitfold.cli.app import Json, ModelArgument, Revision, app, print_json
from bitfold.errors import UsageError

MaxNewTokens = Annotated[int, typer.Option(help="When to stop at the latest.")]
Temperature = Annotated[float, typer.Option(help="0: always the most likely token; 1: as the model says.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that together have this probability.")]
Seed = Annotated[int, typer.Option(help="Of the draws; the same seed gives the same text.")]
Dtype = Annotated[str, typer.Option(help="Of the activations: auto (as stored), float32, bfloat16 or float16.")]


def _show(text: str) -> None:
    print(text, end="", flush=True)


@app.command()
def generate(
    model: ModelArgument,
    text: Annotated[
        str | None, typer.Argument(help="The text to continue.", metavar="[PROMPT]", show_default=False)
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The same, as an option.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Answer the prompt, through the model's chat template.")] = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Continue a text, word by word as it is made."""
    given = [t for t in (text, prompt) if t is not None]
    if len(given) != 1:
        raise UsageError("give one text to continue", where="--prompt")
    from bitfold.engine import Sampling, Writer

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    writer = Writer.open(model, dtype=dtype, revision=revision, chat=chat)
    write = writer.say if chat else writer.write
    if json:
        print_json(write(given[0], sampling).to_dict())
        return
    if not chat and not writer.answers:
        _show(given[0])
    result = write(given[0], sampling, _show)
    print()
    if result.tokens_per_second is not None:
        print(f"{result.tokens} tokens, {result.tokens_per_second:.1f} a second", file=sys.stderr)


@app.command()
def chat(
    model: ModelArgument,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Talk with a model: a line is a message, /reset begins anew, /exit (or end of input) ends."""
    from bitfold.engine import Sampling, Writer

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    writer = Writer.open(model, dtype=dtype, revision=revision, chat=True)
    for line in _lines():
        if line == "/reset":
            writer.messages = []
        elif json:
            # One object a line: a program on the other end reads them as they come.
            print(json_module.dumps(writer.say(line, sampling).to_dict(), ensure_ascii=False), flush=True)
        else:
            writer.say(line, sampling, _show)
            print("\n")


def _lines() -> Iterator[str]:
    """Messages from a person at a terminal, or from a pipe."""
    asking = sys.stdin.isatty()
    while True:
        if asking:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            return
        if line.strip():
            yield line.strip()
