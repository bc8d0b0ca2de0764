"""Windows of a text to learn from, the last of them held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bitfold.errors import UsageError
from bitfold.models.limits import positions
from bitfold.models.vocabulary import refuse_unknown_tokens
from bitfold.text.answers import told_apart
from bitfold.text.tokens import calibration_tokens

_HELD_OUT = 8  # windows at most, a tenth of all at most


def held_out_first(
    tokenizer: Path,
    text: str,
    skeleton: Any,
    windows: int,
    seqlen: int,
    *,
    start_token: bool = True,
    answers_only: bool = False,
) -> tuple[torch.Tensor, int]:
    """int64 (windows, tokens), those held out first, which are the last ones of the text; and how many these are.

    Args:
        tokenizer: folder of the tokenizer.
        text: see `text.documents`.
        skeleton: of the model that reads them, or None where its class is unknown.
        windows: at most.
        seqlen: tokens of a window; fewer if the model takes no more.
        start_token: windows begin as the tokenizer begins a text.
        answers_only: tokens that are not the assistant's are ~id, see `weighed`.

    Raises:
        UsageError: fewer than two windows.
    """
    limit = positions(skeleton.config) if skeleton is not None else None
    seqlen = min(seqlen, limit or seqlen)
    wanted: Any = {"nsamples": windows, "seqlen": seqlen, "start_token": start_token, "answers_only": answers_only}
    ids = calibration_tokens(tokenizer, text, **wanted)
    if len(ids) < 2:
        what = f"the text makes a single window of {seqlen} tokens; two are needed, one to learn from and one held out"
        raise UsageError(what, where=text, hint="give more text, or shorter windows (--seqlen)")
    if skeleton is not None:
        refuse_unknown_tokens(skeleton, told_apart(ids)[0])
    held_out = max(1, min(_HELD_OUT, len(ids) // 10))
    return torch.cat([ids[-held_out:], ids[:-held_out]]), held_out


def weighed(ids: torch.Tensor, held_out: int, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and float32 (windows, tokens - 1): how much each prediction counts, 0 where it is no answer's.

    The mean over the windows held out, and over the others, is that over the answers there.

    Args:
        ids: of `held_out_first`, with `answers_only`.
        held_out: windows.
        text: its name, for errors.

    Raises:
        UsageError: no answers among the windows held out, or among the others.
    """
    ids, said = told_apart(ids)
    weights = said[:, 1:].float()
    for some in (weights[:held_out], weights[held_out:]):
        if not bool(some.any()):
            hint = "more conversations, or longer windows (--seqlen)"
            raise UsageError("there are no answers to learn from, or none held out", where=text, hint=hint)
        some.div_(some.mean())
    return ids, weights
