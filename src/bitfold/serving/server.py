"""`bitfold serve`: a model opened, its memory told, and requests answered until the program is asked to end."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from bitfold.engine.bare import Bare
from bitfold.engine.decoder import CACHES, Decoder, Unsupported
from bitfold.engine.loop import require_plain
from bitfold.engine.opening import Opened, held_bytes, open_model
from bitfold.errors import UsageError
from bitfold.models.model_ref import Model, ModelRef, read_dtype
from bitfold.serving.app import Service, make_app
from bitfold.serving.guessing import Guessing
from bitfold.serving.metrics import Metrics
from bitfold.serving.module import ModuleDecoder
from bitfold.serving.preparing import Preparer
from bitfold.serving.protocol import Steps
from bitfold.serving.scheduler import Scheduler
from bitfold.system import progress
from bitfold.system.units import size_text

CONTEXT = 4096  # tokens, where neither the user nor the model says less
_GRACE = 30  # seconds that texts have to end when the program is asked to end


@dataclass(frozen=True)
class ServerOptions:
    """How a model is served.

    Args:
        host, port: where; 0: any free port.
        context: tokens of a text, prompt included; None: as many as the model takes, at most 4096.
        sequences: texts that are written side by side.
        queue: texts that may wait beside them.
        name: of the model, as clients call it; None: the name of its folder or repository.
        key: that clients must send; None: none.
        origins: of web pages that may ask.
        cache: how keys and values are kept, see `Decoder`.
        guesses: of a text alone, see `Guessing`.
        dtype: of the activations.
        revision: of the Hub repository.

    Raises:
        UsageError: a number that makes no sense.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    context: int | None = None
    sequences: int = 4
    queue: int = 256
    name: str | None = None
    key: str | None = None
    origins: tuple[str, ...] = ()
    cache: str = "auto"
    guesses: int | None = None
    dtype: str = "auto"
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.context is not None and self.context < 2:
            raise UsageError("a text has at least two tokens", where="--context")
        if self.sequences < 1 or self.queue < 0:
            raise UsageError("at least one text at a time, and a queue of 0 or more", where="--sequences, --queue")
        if not 0 <= self.port < 65536:
            raise UsageError("a port is 0 to 65535", where="--port")
        if self.key == "":
            raise UsageError("an empty key protects nothing", where="--api-key")
        if self.cache not in CACHES:
            raise UsageError(f"unknown cache {self.cache!r}", where="--cache", hint=", ".join(CACHES))

    def require(self, longest: int | None) -> None:
        """UsageError for texts longer than a model takes; None: any."""
        if longest is not None and self.context is not None and self.context > longest:
            raise UsageError(f"the model takes {longest} tokens, not {self.context}", where="--context")


@dataclass(frozen=True)
class Ready:
    """What a server is when it begins to listen.

    Args:
        model: as clients call it.
        url: where the paths of OpenAI's clients begin.
        context, sequences: tokens of a text, and texts side by side.
        weight_bytes, cache_bytes, working_bytes: memory of the weights, of all keys and values, and of reading.
    """

    model: str
    url: str
    context: int
    sequences: int
    weight_bytes: int
    cache_bytes: int
    working_bytes: int


def serve(model: Model, options: ServerOptions, on_ready: Callable[[Ready], None] | None = None) -> None:
    """Serve a model until SIGINT or SIGTERM.

    Args:
        model: a folder, a Hub repository or a GGUF file.
        options: how.
        on_ready: is told when it listens.

    Raises:
        ModelError: it does not go on with a text.
        CheckpointError, HubError, UsageError: it cannot be found, read or fetched; the place is taken.
    """
    listening = _listen(options.host, options.port)  # before minutes of loading
    try:
        service, ready = open_service(model, options, listening.getsockname())
    except BaseException:
        listening.close()
        raise
    try:
        progress.say(f"{service.name}: {ready.url}")
        if on_ready is not None:
            on_ready(ready)
        config = uvicorn.Config(
            make_app(service), log_level="warning", timeout_graceful_shutdown=_GRACE, lifespan="off", access_log=False
        )
        uvicorn.Server(config).run(sockets=[listening])
    finally:  # uvicorn lets texts end, and then passes on the signal that ended it
        service.scheduler.close()
        listening.close()


def open_service(model: Model, options: ServerOptions, address: Sequence[Any]) -> tuple[Service, Ready]:
    """Load it, and say what memory it takes; `address`: host and port. Errors as `serve`."""
    ref = ModelRef.of(model, revision=options.revision)
    ref.require_causal("the server takes causal language models")
    opened = open_model(ref, read_dtype(options.dtype), check=lambda _, longest: options.require(longest))
    context = options.context or min(CONTEXT, opened.longest or CONTEXT)
    loaded, decoder = _decoder(opened, context, options)
    tokenizer = opened.tokenizer
    host, port = address[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    name, sequences = options.name or _name(ref), options.sequences
    ready = Ready(name, url, context, sequences, held_bytes(loaded), decoder.cache_bytes, decoder.working_bytes)
    weights, cache, work = map(size_text, (ready.weight_bytes, ready.cache_bytes, ready.working_bytes))
    texts = f"{sequences} texts of {context} tokens side by side"
    progress.say(f"weights {weights}, keys and values {cache} for {texts}, {work} to work in")
    metrics = Metrics()
    service = Service(
        name,
        tokenizer,
        Preparer(tokenizer, loaded.generation_config, context, decoder.vocabulary),
        Scheduler(decoder, metrics, options.queue, Guessing(options.guesses)),
        metrics,
        context,
        options.key,
        options.origins,
    )
    return service, ready


def _decoder(opened: Opened, context: int, options: ServerOptions) -> tuple[Any, Steps]:
    """The model that is run, and what runs it."""
    model: Any = opened.model
    try:
        require_plain(model.generation_config)
    except Unsupported as reason:
        progress.say(f"{reason}: the server does without")
    try:
        return model, Decoder(model, context, sequences=options.sequences, cache=options.cache)
    except Unsupported as reason:
        own = "" if options.cache == "auto" else "; the cache is transformers' own, too"
        progress.say(f"text comes from transformers' model, one after the other, which is slower: {reason}{own}")
        whole = opened.whole() if isinstance(model, Bare) else model
        return whole, ModuleDecoder(whole, context, options.sequences)


def _name(ref: ModelRef) -> str:
    path = Path(ref.name)
    return path.stem if path.suffix == ".gguf" else path.resolve().name


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(2048)
    except OSError as error:
        found.close()
        what = f"cannot listen on {host}:{port}: {error.strerror or error}"
        raise UsageError(what, where="--host, --port", hint="--port 0 takes any free one") from error
    return found
