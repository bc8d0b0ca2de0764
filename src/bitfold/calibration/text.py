"""Text to calibrate on: a file, a data set of the Hub, the text that comes with bitfold, or the model's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitfold import progress
from bitfold.errors import CheckpointError, UsageError

SELF, BUNDLED = "self", "default"


def calibration_tokens(folder: Path, spec: str, *, nsamples: int, seqlen: int) -> torch.Tensor:
    """Token ids (samples, seqlen), int64: documents joined and cut into windows, none skipped.

    Args:
        folder: where the tokenizer is.
        spec: a .txt file, a .jsonl file with a `text` in each line, "default" for the text that comes with bitfold, or
            the name of a Hub data set ("name" or "name:configuration"; needs the extra `eval`).
        nsamples: windows wanted; fewer if the text is shorter.
        seqlen: tokens of a window.

    Raises:
        UsageError: too little text for a single window.
        CheckpointError: the file or the tokenizer cannot be read.
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
        yield (files("bitfold") / "data" / "wikitext2-valid.txt").read_text(encoding="utf-8")
        return
    path = Path(spec)
    if not path.is_file():
        yield from _dataset(spec)
        return
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            yield from (str(json.loads(line)["text"]) for line in text.splitlines() if line.strip())
        else:
            yield text
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot be read as text: {type(error).__name__}: {error}", where=spec) from error


def _dataset(spec: str) -> Iterator[str]:
    if spec.endswith((".txt", ".jsonl")) or spec.startswith((".", "/")):
        raise CheckpointError("there is no such file", where=spec)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UsageError(
            f"{spec!r} is no file, and data sets of the Hub need an extra", hint="pip install 'bitfold[eval]'"
        ) from error
    name, _, configuration = spec.partition(":")
    try:
        for row in load_dataset(name, configuration or None, split="train", streaming=True):
            yield str(row["text"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the data set cannot be read: {error}", where=spec) from error


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
