"""Text out of a model: by the native engine where it has code for the model, else by transformers' own loop."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from bitfold.engine.decoder import Unsupported
from bitfold.engine.loop import Loop
from bitfold.errors import BitfoldError, ModelError, UsageError
from bitfold.models.model_ref import Model, ModelRef, read_dtype
from bitfold.models.vocabulary import refuse_unknown_tokens
from bitfold.system import progress
from bitfold.text.start import text_start
from bitfold.text.tokenizer import require_chat
from bitfold.text.windows import tokenize

OnText = Callable[[str], None]
Message = dict[str, str]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        max_new_tokens: when to stop at the latest.
        temperature: 0 = always the most likely token.
        top_p: draw from the most likely tokens that together have this probability.
        seed: of the draws; the same seed gives the same text.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"cannot generate {self.max_new_tokens} tokens", where="max_new_tokens")
        if self.temperature < 0:
            raise UsageError(f"a temperature of {self.temperature:g} makes no sense", hint="0 or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, not {self.top_p:g}", where="top_p")


@dataclass(frozen=True)
class Generation:
    """A text that was generated.

    Args:
        prompt: what it follows.
        text: the new text, without special tokens.
        prompt_tokens, tokens: before it, and in it.
        seconds: wall-clock time of the generation, loading not included.
        first_token_seconds: of which until the first token was there.
    """

    prompt: str
    text: str
    prompt_tokens: int
    tokens: int
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
        model: in evaluation mode.
        tokenizer: of transformers.
        longest: tokens that the model can attend to, or None.
        messages: the conversation so far.
        native: use the native engine, where it has code for the model; where it has not, one line says why.
    """

    model: nn.Module
    tokenizer: Any
    longest: int | None = None
    messages: list[Message] = field(default_factory=list)
    native: bool = True
    _loop: Loop | None = field(default=None, repr=False)

    @classmethod
    def open(
        cls,
        model: Model,
        *,
        tokenizer: Any = None,
        dtype: str = "auto",
        revision: str | None = None,
        chat: bool = False,
    ) -> Writer:
        """Load a folder or Hub repository, or take a module (then with its tokenizer).

        Raises:
            ModelError: it writes no text.
            CheckpointError, HubError, UsageError: it cannot be found, read or fetched; with `chat`, a chat
                template that is missing or cannot be used.
        """
        subject = ModelRef.of(model, revision=revision)
        subject.require_generation("generate takes causal language models and encoder-decoders")
        tokenizer = subject.tokenizer() if tokenizer is None else tokenizer
        if chat:  # before minutes of loading
            require_chat(tokenizer, subject.name)
        kind = "AutoModelForSeq2SeqLM" if subject.encodes_first() else "AutoModelForCausalLM"
        return cls(subject.load(kind, read_dtype(dtype)), tokenizer, subject.longest)

    @property
    def answers(self) -> bool:
        """Whether it is an encoder-decoder: what it writes answers the prompt, and begins with a token of its own."""
        return bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))

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
            require_chat(self.tokenizer, type(self.model).__name__)
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
        refuse_unknown_tokens(self.model, ids, self.tokenizer)
        room = sampling.max_new_tokens if self.longest is None else self.longest - self._before(ids)
        if room < 1:
            hint = "shorten it, or begin a new conversation"
            raise UsageError(f"{ids.shape[1]} tokens are more than the model can take, {self.longest}", hint=hint)
        streamer = _Streamer(self.tokenizer, on_text)
        start = time.monotonic()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(sampling.seed)
            new = self._generate(ids, self._config(sampling, min(room, sampling.max_new_tokens)), streamer)
        seconds = time.monotonic() - start
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        first = (streamer.first_at or time.monotonic()) - start
        return Generation(prompt, text, ids.shape[1], len(new), seconds, first)

    def _before(self, ids: torch.Tensor) -> int:
        """Tokens in front of the new ones: the prompt, or the one token that an answer begins with."""
        return 1 if self.answers else int(ids.shape[1])

    def _generate(self, ids: torch.Tensor, config: Any, streamer: _Streamer) -> list[int]:
        if self.native:
            try:
                self._loop = self._loop or Loop(self.model)
                return self._loop.generate(ids[0].tolist(), config, streamer)
            except Unsupported as reason:
                self.native = False
                progress.say(f"text comes from transformers' own loop, which is slower: {reason}")
        with _in_words(self.model):
            out: torch.Tensor = self.model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=streamer
            )
        made: list[int] = out[0, self._before(ids) :].tolist()
        return made

    def _config(self, sampling: Sampling, max_new_tokens: int) -> Any:
        """The model's own generation config (its end tokens), with nothing but our choice of sampling."""
        config: Any = copy.deepcopy(self.model.generation_config)
        draws = sampling.temperature > 0
        config.update(
            max_new_tokens=max_new_tokens,
            max_length=None,
            do_sample=draws,
            temperature=sampling.temperature if draws else None,
            top_p=sampling.top_p if draws else None,
            top_k=0 if draws else None,
        )
        if config.pad_token_id is None:
            end = config.eos_token_id
            config.pad_token_id = end[0] if isinstance(end, list) and end else end
        return config


@contextlib.contextmanager
def _in_words(model: nn.Module) -> Iterator[None]:
    """What a family raises that wants a picture or a sound beside the text, or has no token to begin with."""
    try:
        yield
    except (BitfoldError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or repr(error)
        raise ModelError(f"does not write from this text alone: {reason}", where=type(model).__name__) from error


class _Streamer:
    """Receives token ids from transformers' loop and passes text on as soon as its characters are certain.

    A token may be a part of a character, and some tokenizers strip the space in front of a word: so all tokens so far
    are decoded again from the last line break on, and what is new is passed on, up to the last whole character.
    """

    def __init__(self, tokenizer: Any, on_text: OnText | None) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.first_at: float | None = None
        self._prompt_seen = False
        self._ids: list[int] = []
        self._shown = 0

    def put(self, value: torch.Tensor) -> None:
        """Called by transformers: first with the prompt, then with each new token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.first_at = self.first_at or time.monotonic()
        self._ids += value.reshape(-1).tolist()
        self._show(final=False)

    def end(self) -> None:
        """Called by transformers after the last token."""
        self._show(final=True)

    def _show(self, *, final: bool) -> None:
        if self.on_text is None:
            return
        text = str(self.tokenizer.decode(self._ids, skip_special_tokens=True))
        sure = len(text) if final else len(text.rstrip("\ufffd"))
        if sure > self._shown:
            self.on_text(text[self._shown : sure])
            self._shown = sure
        if text.endswith("\n") and sure == len(text):
            self._ids, self._shown = [], 0


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
