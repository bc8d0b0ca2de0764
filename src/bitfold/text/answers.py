"""Which tokens of conversations are the assistant's: training may learn these alone, and read the others."""

from __future__ import annotations

from typing import Any

import torch

from bitfold.errors import UsageError
from bitfold.text.chat import Renderer
from bitfold.text.documents import text_pieces
from bitfold.text.shapes import Conversation
from bitfold.text.start import start_name, text_start
from bitfold.text.windows import DIALOGUE, own_dialogue, text_name


def answer_tokens(text: str, tokenizer: Any, *, enough: int | None) -> torch.Tensor:
    """int64 (tokens,) of conversations, or of pairs of prompt and answer: an id where the assistant speaks, else ~id.

    Args:
        text: see `documents.text_pieces`; the split `train` where it names none.
        tokenizer: of transformers.
        enough: tokens that are needed; None: all.

    Raises:
        UsageError: not all of it is conversations; or the tokenizer does not say where its tokens are.
        CheckpointError, HubError: a data set that cannot be read.
    """
    if not getattr(tokenizer, "is_fast", False):
        what = "the tokenizer does not say where its tokens are, so that answers cannot be told from the rest"
        raise UsageError(what, where=text_name(text))
    start = text_start(tokenizer)
    renderer, found = Renderer(tokenizer, start_name(start, tokenizer) or ""), list[list[tuple[int, int]]]()

    def render(conversation: Conversation, where: str, name: str) -> str:
        written, spans = renderer.answers(conversation, where, name)
        found.append(spans)
        return written

    pieces = own_dialogue(render) if text == DIALOGUE else text_pieces(text, split="train", render=render)
    parts, count = list[torch.Tensor](), 0
    for piece in pieces:
        if not found:
            what = "holds text that is no conversation, of which no part is an answer"
            raise UsageError(what, where=text_name(text), hint="messages, or prompt and completion; or let all count")
        ids = _flagged(piece, found.pop(), tokenizer)
        parts.append(
            ids[len(start) :] if start and tuple(ids[: len(start)].tolist()) == tuple(~t for t in start) else ids
        )
        count += len(parts[-1])
        if enough is not None and count >= enough:
            break
    return torch.cat([torch.empty(0, dtype=torch.int64), *parts])[:enough]


def told_apart(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and whether each is the assistant's, of what `answer_tokens` gives."""
    return torch.where(ids < 0, ~ids, ids), ids >= 0


def _flagged(text: str, spans: list[tuple[int, int]], tokenizer: Any) -> torch.Tensor:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = torch.tensor(found["input_ids"], dtype=torch.int64)
    begins = torch.tensor([begin for begin, _ in found["offset_mapping"]], dtype=torch.int64)
    said = torch.zeros(len(ids), dtype=torch.bool)
    for begin, end in spans:
        said |= (begins >= begin) & (begins < end)
    return torch.where(said, ids, ~ids)
