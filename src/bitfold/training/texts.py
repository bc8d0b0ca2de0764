"""Windows of a text to learn from, the last of them held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bitfold.errors import UsageError
from bitfold.models.limits import positions
from bitfold.models.vocabulary import refuse_unknown_tokens
from bitfold.text.tokens import calibration_tokens

_HELD_OUT = 8  # windows at most, a tenth of all at most


def held_out_first(
    tokenizer: Path, text: str, skeleton: Any, windows: int, seqlen: int, *, start_token: bool = True
) -> tuple[torch.Tensor, int]:
    """int64 (windows, tokens), those held out first, which are the last ones of the text; and how many these are.

    Args:
        tokenizer: folder of the tokenizer.
        text: see `text.documents`.
        skeleton: of the model that reads them, or None where its class is unknown.
        windows: at most.
        seqlen: tokens of a window; fewer if the model takes no more.
        start_token: windows begin as the tokenizer begins a text.

    Raises:
        UsageError: fewer than two windows.
    """
    limit = positions(skeleton.config) if skeleton is not None else None
    seqlen = min(seqlen, limit or seqlen)
    ids = calibration_tokens(tokenizer, text, nsamples=windows, seqlen=seqlen, start_token=start_token)
    if len(ids) < 2:
        what = f"the text makes a single window of {seqlen} tokens; two are needed, one to learn from and one held out"
        raise UsageError(what, where=text, hint="give more text, or shorter windows (--seqlen)")
    if skeleton is not None:
        refuse_unknown_tokens(skeleton, ids)
    held_out = max(1, min(_HELD_OUT, len(ids) // 10))
    return torch.cat([ids[-held_out:], ids[:-held_out]]), held_out
