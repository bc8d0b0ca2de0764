"""Text to calibrate on: a file, a data set of the Hub, the text that comes with bitfold, or the model's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitfold.errors import UsageError
from bitfold.system import progress
from bitfold.text import windows
from bitfold.text.answers import answer_tokens
from bitfold.text.mixes import parts_of, shares
from bitfold.text.start import text_start
from bitfold.text.tokenizer import read_tokenizer

SELF, BUNDLED = "self", "default"


def calibration_tokens(
    folder: Path, spec: str, *, nsamples: int, seqlen: int, start_token: bool = True, answers_only: bool = False
) -> torch.Tensor:
    """Token ids (samples, seqlen), int64: documents joined and cut into windows side by side.

    Args:
        folder: where the tokenizer is.
        spec: "default" for the text that comes with bitfold, or a file or data set, see `documents.text_pieces` (split
            `train` where the name says no other); its start is taken, and no more of it read. Or several, see `mixes`:
            their windows come spread evenly, in these shares.
        nsamples: windows wanted; fewer if the text is shorter.
        seqlen: tokens of a window.
        start_token: windows begin as the tokenizer begins a text (see `start`).
        answers_only: tokens that are not the assistant's are ~id, see `answers`.

    Raises:
        UsageError: no such file, or too little text for a single window.
        CheckpointError, HubError: the data set or the tokenizer cannot be read.
    """
    tokenizer, parts = read_tokenizer(folder), parts_of(spec)
    start = text_start(tokenizer, start_token)
    counts = shares(parts, nsamples)
    read = _answers if answers_only else _all
    if answers_only:
        start = tuple(~token for token in start)
    found = [_windows_of(part.spec, tokenizer, start, n, seqlen, read) for part, n in zip(parts, counts, strict=True)]
    if len(found) == 1:
        return found[0]
    # Where one is too short for its share, there is less of the others as well.
    scale = min(len(ids) / count for ids, count in zip(found, counts, strict=True))
    found = [ids[: max(1, round(scale * count))] for ids, count in zip(found, counts, strict=True)]
    # The last windows, which training holds out, are of all texts as well.
    places = [(i + 0.5) / len(ids) for ids in found for i in range(len(ids))]
    return torch.cat(found)[torch.tensor(places, dtype=torch.float64).argsort(stable=True)]


def _all(spec: str, tokenizer: Any, enough: int) -> torch.Tensor:
    return windows.read_tokens(spec, tokenizer, enough=enough, split="train")


def _answers(spec: str, tokenizer: Any, enough: int) -> torch.Tensor:
    return answer_tokens(spec, tokenizer, enough=enough)


def _windows_of(
    spec: str,
    tokenizer: Any,
    start: tuple[int, ...],
    count: int,
    seqlen: int,
    read: Callable[[str, Any, int], torch.Tensor],
) -> torch.Tensor:
    own = seqlen - len(start)
    ids = read(spec, tokenizer, count * max(1, own))
    if len(ids) < own:
        what = f"the calibration text has {len(ids)} tokens, one sample needs {own}"
        raise UsageError(what, where=windows.text_name(spec), hint="give more text, or a shorter --seqlen")
    return windows.cut(ids, seqlen, None, None, start).ids[:count]


@torch.no_grad()
def own_text(model: nn.Module, *, nsamples: int, seqlen: int, seed: int, start: tuple[int, ...] = ()) -> torch.Tensor:
    """Token ids (samples, seqlen) that the model writes itself, from its first token, at temperature 1.

    Args:
        model: a causal language model of transformers, in memory.
        nsamples, seqlen: shape of the result.
        seed: of the sampling.
        start: what it goes on from, see `text_start`; where nothing begins a text, the token that its config
            names for it.
    """
    config: Any = model.config
    first = start or (config.bos_token_id if config.bos_token_id is not None else 0,)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(first).repeat(nsamples, 1)
    new, cache = ids, None
    with progress.bar("write calibration text", seqlen) as bar:
        for _ in range(seqlen - len(first)):
            out = model(input_ids=new, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            new = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, new], 1)
            bar.advance(1)
    return ids
