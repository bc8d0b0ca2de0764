"""Text to calibrate on: a file, a data set of the Hub, the text that comes with bitfold, or the model's own."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitfold.errors import CheckpointError, UsageError
from bitfold.system import progress
from bitfold.text.documents import documents

SELF, BUNDLED = "self", "default"


def calibration_tokens(folder: Path, spec: str, *, nsamples: int, seqlen: int) -> torch.Tensor:
    """Token ids (samples, seqlen), int64: documents joined and cut into windows, none skipped.

    Args:
        folder: where the tokenizer is.
        spec: "default" for the text that comes with bitfold, or a file or data set, see `documents.documents` (split
            `train` where the name says no other).
        nsamples: windows wanted; fewer if the text is shorter.
        seqlen: tokens of a window.

    Raises:
        UsageError: no such file, or too little text for a single window.
        CheckpointError, HubError: the data set or the tokenizer cannot be read.
    """
    tokenizer = load_tokenizer(folder)
    ids: list[int] = []
    for text in _documents(spec):
        ids += tokenizer(text)["input_ids"]
        if len(ids) >= nsamples * seqlen:
            break
    count = min(nsamples, len(ids) // seqlen)
    if count == 0:
        raise UsageError(
            f"the calibration text {spec!r} has {len(ids)} tokens, one sample needs {seqlen}",
            hint="give more text, or a shorter --seqlen",
        )
    return torch.tensor(ids[: count * seqlen]).view(count, seqlen)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; CheckpointError when there is none that transformers can read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [repr(error)])[0]
        raise CheckpointError(f"has no tokenizer that can be read: {first}", where=str(folder)) from error


def _documents(spec: str) -> Iterator[str]:
    if spec == BUNDLED:
        return iter([(files("bitfold.text") / "data" / "wikitext2-valid.txt").read_text(encoding="utf-8")])
    return documents(spec, split="train")


@torch.no_grad()
def own_text(model: nn.Module, *, nsamples: int, seqlen: int, seed: int) -> torch.Tensor:
    """Token ids (samples, seqlen) that the model writes itself, from its first token, at temperature 1.

    Args:
        model: a causal language model of transformers, in memory.
        nsamples, seqlen: shape of the result.
        seed: of the sampling.
    """
    config: Any = model.config
    first = config.bos_token_id if config.bos_token_id is not None else 0
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((nsamples, 1), int(first))
    cache = None
    with progress.bar("write calibration text", seqlen) as bar:
        for _ in range(seqlen - 1):
            out = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            nxt = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, nxt], 1)
            bar.advance(1)
    return ids
