"""Token after token through the native decoder, under the same generation config as transformers' own loop.

Logits are processed by transformers' own classes, so what is asked of both is the same; a setting that this loop does
not know is a reason to use the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitfold.engine.decoder import Decoder, Unsupported

_ROOM = 256  # tokens by which the cache grows
# Settings of a generation config that this loop has no code for; false, 0 and None mean: not wanted.
_OTHERS = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "constraints",
    "diversity_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "penalty_alpha",
    "remove_invalid_values",
    "sequence_bias",
    "stop_strings",
    "suppress_tokens",
    "watermarking_config",
)


class Streamer(Protocol):
    """Is told of the prompt first, then of each new token."""

    def put(self, value: Tensor) -> None: ...
    def end(self) -> None: ...


class Loop:
    """Generates with one model; keeps the cache, so that a text that goes on is not read again.

    Args:
        model: a causal language model on the CPU.

    Raises:
        Unsupported: the engine has no code for it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._decoder = Decoder(model, _ROOM)

    def generate(self, ids: Sequence[int], config: Any, streamer: Streamer) -> list[int]:
        """The tokens that follow `ids`, up to an end token (included) or `config.max_new_tokens`.

        Args:
            ids: the prompt.
            config: transformers' GenerationConfig.
            streamer: is told of them as they come.

        Raises:
            Unsupported: the config asks for something this loop cannot do; nothing has been generated.
        """
        processors, ends = _processors(config), _ends(config)
        self._make_room(len(ids) + config.max_new_tokens)
        streamer.put(torch.tensor([list(ids)]))
        seen, new = list(ids), list(ids[self._decoder.keep(ids) :])
        made: list[int] = []
        while len(made) < config.max_new_tokens:
            logits = self._decoder.extend(new)
            token = _choose(logits, seen, processors, draws=bool(config.do_sample))
            new = [token]
            seen.append(token)
            made.append(token)
            streamer.put(torch.tensor(new))
            if token in ends:
                break
        streamer.end()
        return made

    def _make_room(self, tokens: int) -> None:
        if tokens > self._decoder.positions:
            self._decoder = Decoder(self._model, -(-tokens // _ROOM) * _ROOM)


def _processors(config: Any) -> list[Any]:
    from transformers.generation import logits_process as lp

    if others := [name for name in _OTHERS if getattr(config, name, None)]:
        raise Unsupported(f"the model's generation config asks for {', '.join(others)}")
    if (config.num_beams or 1) > 1:
        raise Unsupported("beams")
    found: list[Any] = []
    if config.repetition_penalty not in (None, 1.0):
        found.append(lp.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.do_sample:
        if config.temperature not in (None, 1.0):
            found.append(lp.TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            found.append(lp.TopKLogitsWarper(config.top_k))
        if config.top_p not in (None, 1.0):
            found.append(lp.TopPLogitsWarper(config.top_p))
        if getattr(config, "min_p", None):
            found.append(lp.MinPLogitsWarper(config.min_p))
        if getattr(config, "typical_p", None) not in (None, 1.0):
            found.append(lp.TypicalLogitsWarper(config.typical_p))
    return found


def _ends(config: Any) -> set[int]:
    ends = config.eos_token_id
    return set() if ends is None else set(ends) if isinstance(ends, (list, tuple)) else {int(ends)}


def _choose(logits: Tensor, seen: list[int], processors: list[Any], *, draws: bool) -> int:
    scores = logits[None]
    if processors:
        context = torch.tensor([seen])
        for process in processors:
            scores = process(context, scores)
    if not draws:
        return int(scores.argmax())
    return int(torch.multinomial(scores.softmax(-1), 1))
