"""Text out of a model: by the native engine where it has code for the model, else by transformers' own loop."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitfold.engine.bare import Bare
from bitfold.engine.decoder import Unsupported
from bitfold.engine.grammar import Guide
from bitfold.engine.loop import Loop, OnToken, by_transformers, end_tokens, require_plain, stop_texts
from bitfold.engine.opening import open_model
from bitfold.engine.sampling import Sampler, Sampling
from bitfold.engine.stream import TextStream
from bitfold.errors import BitfoldError, ModelError, UsageError
from bitfold.models.model_ref import Model, ModelRef, read_dtype
from bitfold.models.vocabulary import refuse_unknown_tokens
from bitfold.system import progress
from bitfold.system.backend import CPU, find_device, within_memory
from bitfold.text.start import text_start
from bitfold.text.tokenizer import require_chat
from bitfold.text.windows import tokenize

OnText = Callable[[str], None]
Message = dict[str, str]


@dataclass(frozen=True)
class Generation:
    """A text that was generated.

    Args:
        prompt: what it follows.
        text: the new text, without special tokens.
        prompt_tokens, tokens: before it, and in it.
        finish: why it ended: "end" (the model ended it, or its grammar allowed no more), "stop" (a stop text),
            "length", "interrupted" (Ctrl-C).
        seconds: wall-clock time of the generation, loading not included.
        first_token_seconds: of which until the first token was there.
    """

    prompt: str
    text: str
    prompt_tokens: int
    tokens: int
    finish: str
    seconds: float
    first_token_seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first token; None for a single token."""
        rest = self.seconds - self.first_token_seconds
        return (self.tokens - 1) / rest if self.tokens > 1 and rest > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


@dataclass
class Writer:
    """A model with its tokenizer, ready to write; keeps the conversation of `say`.

    Args:
        model: of transformers, in evaluation mode.
        tokenizer: of transformers, or a `PlainTokenizer`.
        longest: tokens that the model can attend to, or None.
        messages: the conversation so far.
        native: use the native engine, where it has code for the model; where it has not, one line says why.
        guesses: of the native engine, tokens that are guessed from the text so far and read along with the next one;
            None: as many as pay, 0: none. The text is the same.
        cache: of the native engine, how keys and values are kept, see `Decoder`.
        prompt_cache: of the native engine, a file that keeps those of the prompt.
        interruptible: Ctrl-C ends the text that is being written, and nothing else.
    """

    model: nn.Module
    tokenizer: Any
    longest: int | None = None
    messages: list[Message] = field(default_factory=list)
    native: bool = True
    guesses: int | None = None
    cache: str = "auto"
    prompt_cache: Path | None = None
    interruptible: bool = False
    _loop: Loop | None = field(default=None, repr=False)
    _guide: Guide | None = field(default=None, repr=False)

    @classmethod
    def open(
        cls,
        model: Model,
        *,
        tokenizer: Any = None,
        dtype: str = "auto",
        revision: str | None = None,
        chat: bool = False,
        device: str | torch.device = "cpu",
    ) -> Writer:
        """Load a folder or Hub repository, or take a module (then with its tokenizer), to write on that device.

        On an accelerator, transformers' own loop runs the model: the native engine is for the CPU.

        Raises:
            ModelError: it writes no text.
            CheckpointError, HubError, UsageError: it cannot be found, read or fetched; with `chat`, a chat
                template that is missing or cannot be used.
        """
        subject, place = ModelRef.of(model, revision=revision), find_device(device)
        found = open_model(
            subject,
            read_dtype(dtype),
            tokenizer=tokenizer,
            check=lambda tokenizer, _: require_chat(tokenizer, subject.name) if chat else None,
            require=lambda ref: ref.require_generation("generate takes causal language models and encoder-decoders"),
            device=place,
        )
        if isinstance(found.model, Bare):
            made = _Opened(found.model, found.tokenizer, found.longest)
            made.whole = found.whole
            return made
        return cls(found.model, found.tokenizer, found.longest, native=place.type == "cpu")

    @property
    def running(self) -> Any:
        """What the engine runs: the model, or as much of it as it needs."""
        return self.model

    @property
    def answers(self) -> bool:
        """Whether it is an encoder-decoder: what it writes answers the prompt, and begins with a token of its own."""
        return bool(getattr(getattr(self.running, "config", None), "is_encoder_decoder", False))

    def write(self, prompt: str, sampling: Sampling | None = None, on_text: OnText | None = None) -> Generation:
        """Continue the prompt, or answer it; `on_text` gets the new text piece by piece, word by word."""
        if self.answers:  # an encoder reads whole texts, with the token that ends them
            ids = torch.tensor(self.tokenizer(prompt)["input_ids"], dtype=torch.int64)
        else:
            start = torch.tensor(text_start(self.tokenizer), dtype=torch.int64)
            ids = torch.cat([start, tokenize(prompt, self.tokenizer)])
        return self._run(prompt, ids[None], sampling or Sampling(), on_text)

    def say(self, text: str, sampling: Sampling | None = None, on_text: OnText | None = None) -> Generation:
        """Answer a message, with the conversation so far as context; both are added to it.

        Raises:
            UsageError: the tokenizer has no chat template, or the conversation is longer than the model can take.
            CheckpointError: its chat template cannot be used.
        """
        if not self.messages:
            require_chat(self.tokenizer, type(self.running).__name__)
        messages = [*self.messages, {"role": "user", "content": text}]
        tokens = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = self._run(text, tokens["input_ids"], sampling or Sampling(), on_text)
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        return answer

    def _run(self, prompt: str, ids: torch.Tensor, sampling: Sampling, on_text: OnText | None) -> Generation:
        if ids.shape[1] == 0:
            raise UsageError("the prompt is empty")
        refuse_unknown_tokens(self.running, ids, self.tokenizer)
        room = sampling.max_new_tokens if self.longest is None else self.longest - self._before(ids)
        if room < 1:
            hint = "shorten it, or begin a new conversation"
            raise UsageError(f"{ids.shape[1]} tokens are more than the model can take, {self.longest}", hint=hint)
        config = self._config(self.running, min(room, sampling.max_new_tokens))
        sampler = self._sampler(ids, sampling)
        text = _Text(self.tokenizer, (*sampling.stop, *stop_texts(self.running.generation_config)), on_text)
        start = time.monotonic()
        try:
            with torch.no_grad():
                self._generate(ids, config, sampler, text.add)
        except KeyboardInterrupt:
            if not self.interruptible:
                raise
            text.interrupted = True
        cut = len(text.ids) >= config.max_new_tokens and text.ids[-1] not in end_tokens(config) and not sampler.complete
        return text.generation(prompt, ids.shape[1], start, "length" if cut else "end")

    def _before(self, ids: torch.Tensor) -> int:
        """Tokens in front of the new ones: the prompt, or the one token that an answer begins with."""
        return 1 if self.answers else int(ids.shape[1])

    def _generate(self, ids: torch.Tensor, config: Any, sampler: Sampler, on_token: OnToken) -> None:
        if self.native:
            try:
                require_plain(config)
                if self._loop is None:
                    room = int(ids.shape[1]) + int(config.max_new_tokens)
                    self._loop = Loop(self.running, self.guesses, self.cache, self.prompt_cache, room)
                self._loop.generate(ids[0].tolist(), sampler, config.max_new_tokens, end_tokens(config), on_token)
                return
            except Unsupported as reason:
                self.native = False
                own = (
                    "" if (self.cache, self.prompt_cache) == ("auto", None) else "; the cache is transformers' own, too"
                )
                progress.say(f"text comes from transformers' own loop, which is slower: {reason}{own}")
        with _in_words(self.model):
            model = self.model
            by_transformers(
                model, ids.to(_device_of(model)), self._config(model, config.max_new_tokens), sampler, on_token
            )

    def _sampler(self, ids: torch.Tensor, sampling: Sampling) -> Sampler:
        config, matcher = self.running.generation_config, None
        if sampling.grammar is not None:
            self._guide = self._guide or Guide(self.tokenizer, sorted(end_tokens(config)))
            matcher = self._guide.matcher(sampling.grammar)
        return Sampler(sampling.filled(config), () if self.answers else ids[0].tolist(), matcher)

    @staticmethod
    def _config(model: Any, max_new_tokens: int) -> Any:
        """The model's own generation config (its end tokens), without what the sampler does."""
        config: Any = copy.deepcopy(model.generation_config)
        config.update(
            max_new_tokens=max_new_tokens,
            max_length=None,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            min_p=None,
            typical_p=None,
            repetition_penalty=None,
            stop_strings=None,
        )
        if config.pad_token_id is None:
            end = config.eos_token_id
            config.pad_token_id = end[0] if isinstance(end, list) and end else end
        return config


class _Opened(Writer):
    """A writer of which the engine has what it needs; transformers' model is loaded when somebody asks for it.

    From then on the engine runs that one: its settings can be changed as those of any.
    """

    whole: Callable[[], nn.Module]
    _given: nn.Module

    @property
    def model(self) -> nn.Module:
        """The model of transformers."""
        if isinstance(self._given, Bare):
            self._given, self._loop = self.whole(), None
        return self._given

    @model.setter
    def model(self, model: nn.Module) -> None:
        self._given = model

    @property
    def running(self) -> Any:
        """See `Writer`."""
        return self._given


def _device_of(model: nn.Module) -> torch.device:
    return next((t.device for t in (*model.parameters(), *model.buffers())), CPU)


@contextlib.contextmanager
def _in_words(model: nn.Module) -> Iterator[None]:
    """What a family raises that wants a picture or a sound beside the text, or has no token to begin with."""
    try:
        with within_memory(_device_of(model)):
            yield
    except (BitfoldError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or repr(error)
        raise ModelError(f"does not write from this text alone: {reason}", where=type(model).__name__) from error


class _Text:
    """A text while it is written: what of it is shown, and when its first token was there."""

    def __init__(self, tokenizer: Any, stops: tuple[str, ...], on_text: OnText | None) -> None:
        self._stream, self._on_text = TextStream(tokenizer, stops), on_text
        self._first_at: float | None = None
        self.ids: list[int] = []
        self.interrupted = False

    def add(self, token: int) -> bool:
        """A token; whether the text ends with it."""
        self._first_at = self._first_at or time.monotonic()
        self.ids.append(token)
        self._show(self._stream.add(token))
        return self._stream.stopped

    def _show(self, text: str) -> None:
        if text and self._on_text is not None:
            self._on_text(text)

    def generation(self, prompt: str, prompt_tokens: int, start: float, finish: str) -> Generation:
        """The text is whole, ended as `finish` says if nothing else ended it before."""
        now = time.monotonic()
        self._show(self._stream.finish())
        if self.interrupted or self._stream.stopped:
            finish = "interrupted" if self.interrupted else "stop"
        first = (self._first_at or now) - start
        return Generation(prompt, self._stream.text, prompt_tokens, len(self.ids), finish, now - start, first)


def generate(
    model: Model,
    prompt: str,
    *,
    sampling: Sampling | None = None,
    chat: bool = False,
    tokenizer: Any = None,
    dtype: str = "auto",
    on_text: OnText | None = None,
) -> Generation:
    """Generate text once.

    Args:
        model: a folder, a Hub repository, or a module.
        prompt: the text to continue, or with `chat` the message to answer.
        sampling: greedy, 256 tokens by default.
        chat: use the model's chat template.
        tokenizer: for a module.
        dtype: of the activations and of weights that are not quantized; "auto": as stored.
        on_text: gets the text piece by piece.

    Raises:
        ModelError, CheckpointError, HubError, UsageError: see `Writer.open`, `Writer.say`.
    """
    writer = Writer.open(model, tokenizer=tokenizer, dtype=dtype, chat=chat)
    return (writer.say if chat else writer.write)(prompt, sampling, on_text)
