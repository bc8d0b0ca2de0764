"""`bitfold generate` and `bitfold chat`."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitfold.cli.app import Device, Json, MaxGpuMemory, ModelArgument, Revision, app, print_json, the_device
from bitfold.errors import UsageError

if TYPE_CHECKING:
    import torch

    from bitfold.engine import Grammar

MaxNewTokens = Annotated[int, typer.Option(help="When to stop at the latest.")]
Temperature = Annotated[float, typer.Option(help="0: always the most likely token; 1: as the model says.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that together have this probability.")]
TopK = Annotated[int, typer.Option(help="Draw from this many of the likeliest tokens; 0: from all.")]
MinP = Annotated[
    float | None,
    typer.Option(help="Draw from tokens at least this likely, as a share of the likeliest one.", show_default=False),
]
TypicalP = Annotated[
    float | None,
    typer.Option(help="Draw from the most typical tokens that together have this probability.", show_default=False),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(help="Above 1: tokens of the prompt and the text become less likely.", show_default=False),
]
PresencePenalty = Annotated[float, typer.Option(help="Taken from the logits of tokens that the text has.")]
FrequencyPenalty = Annotated[float, typer.Option(help="The same, for each time that the text has them.")]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(help="TOKEN:BIAS: added to the logit of a token (its number). May be repeated.", show_default=False),
]
Stop = Annotated[
    list[str] | None, typer.Option(help="A text that ends it, and is not printed. May be repeated.", show_default=False)
]
JsonSchema = Annotated[
    Path | None, typer.Option(help="A file with the JSON schema of what is written.", show_default=False)
]
Regex = Annotated[str | None, typer.Option(help="A regular expression that all of it must match.", show_default=False)]
GrammarFile = Annotated[
    Path | None,
    typer.Option("--grammar", help="A file with its grammar, in Lark's notation or in GBNF.", show_default=False),
]
Speculate = Annotated[
    str, typer.Option(help="Tokens guessed from the text so far and read along: auto (as many as pay), off, or N.")
]
Cache = Annotated[str, typer.Option(help="Keys and values: auto, f16, bf16, int8, int4 (from a billion weights on).")]
PromptCache = Annotated[
    Path | None,
    typer.Option(help="A file that keeps keys and values of the prompt for the next time.", show_default=False),
]
Seed = Annotated[int, typer.Option(help="Of the draws; the same seed gives the same text.")]
Dtype = Annotated[str, typer.Option(help="Of the activations: auto (as stored), float32, bfloat16 or float16.")]


def guesses_of(text: str) -> int | None:
    """What `--speculate` means: None for auto."""
    if text == "auto":
        return None
    if text == "off":
        return 0
    if text.isdecimal() and int(text) <= 64:
        return int(text)
    raise UsageError(f"{text!r} is not a number of tokens", where="--speculate", hint="auto, off, or 0 to 64")


def _cache(name: str) -> str:
    from bitfold.engine.decoder import CACHES

    if name not in CACHES:
        raise UsageError(f"unknown cache {name!r}", where="--cache", hint=", ".join(CACHES))
    return name


def _bias(words: list[str] | None) -> dict[int, float]:
    """What `--logit-bias` means."""
    try:
        pairs = [word.rsplit(":", 1) for word in words or ()]
        return {int(token): float(bias) for token, bias in pairs}
    except ValueError as error:
        raise UsageError("a bias is TOKEN:BIAS, two numbers", where="--logit-bias") from error


def _grammar(schema: Path | None, regex: str | None, grammar: Path | None) -> Grammar | None:
    from bitfold.engine import Grammar

    if sum(given is not None for given in (schema, regex, grammar)) > 1:
        raise UsageError("a text has one grammar", where="--json-schema, --regex, --grammar")
    if regex is not None:
        return Grammar("regex", regex)
    if schema is not None:
        return Grammar.read("json_schema", schema)
    return None if grammar is None else Grammar.read("grammar", grammar)


def _place(device: str, max_gpu_memory: str | None, *, native_only: bool) -> torch.device:
    """Where to write; `native_only`: flags of the native engine are given."""
    place = the_device(device, max_gpu_memory)
    if native_only and place.type != "cpu":
        what = f"--speculate, --cache and --prompt-cache are of the native engine, which does not run on {place}"
        raise UsageError(what, where="--device", hint="leave them out, or --device cpu")
    return place


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
    top_k: TopK = 0,
    min_p: MinP = None,
    typical_p: TypicalP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    logit_bias: LogitBias = None,
    stop: Stop = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    grammar: GrammarFile = None,
    speculate: Speculate = "auto",
    cache: Cache = "auto",
    prompt_cache: PromptCache = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    max_gpu_memory: MaxGpuMemory = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Continue a text, word by word as it is made."""
    given = [t for t in (text, prompt) if t is not None]
    if len(given) != 1:
        raise UsageError("give one text to continue", where="--prompt")
    from bitfold.engine import Sampling, Writer

    penalties = (repetition_penalty, presence_penalty, frequency_penalty, _bias(logit_bias), tuple(stop or ()))
    asked = _grammar(json_schema, regex, grammar)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed, top_k, min_p, typical_p, *penalties, asked)
    guesses, kind = guesses_of(speculate), _cache(cache)
    place = _place(device, max_gpu_memory, native_only=(speculate, cache, prompt_cache) != ("auto", "auto", None))
    writer = Writer.open(model, dtype=dtype, revision=revision, chat=chat, device=place)
    writer.guesses, writer.cache, writer.prompt_cache = guesses, kind, prompt_cache
    write = writer.say if chat else writer.write
    if json:
        print_json(write(given[0], sampling).to_dict())
        return
    begin = "" if chat or writer.answers else given[0]
    shown: list[str] = []

    def show(piece: str) -> None:  # with the first word: what goes wrong before it is an error, and no text
        _show(piece if shown else begin + piece)
        shown.append(piece)

    result = write(given[0], sampling, show)
    print("" if shown else begin)
    if result.tokens_per_second is not None:
        print(f"{result.tokens} tokens, {result.tokens_per_second:.1f} a second", file=sys.stderr)


@app.command()
def chat(
    model: ModelArgument,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    min_p: MinP = None,
    typical_p: TypicalP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    logit_bias: LogitBias = None,
    stop: Stop = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    grammar: GrammarFile = None,
    speculate: Speculate = "auto",
    cache: Cache = "auto",
    prompt_cache: PromptCache = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Talk with a model: a line is a message, /reset begins anew, Ctrl-C ends an answer, /exit all of it."""
    from bitfold.engine import Sampling, Writer

    penalties = (repetition_penalty, presence_penalty, frequency_penalty, _bias(logit_bias), tuple(stop or ()))
    asked = _grammar(json_schema, regex, grammar)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed, top_k, min_p, typical_p, *penalties, asked)
    guesses, kind = guesses_of(speculate), _cache(cache)
    writer = Writer.open(model, dtype=dtype, revision=revision, chat=True)
    writer.guesses, writer.cache, writer.prompt_cache = guesses, kind, prompt_cache
    writer.interruptible = True
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
