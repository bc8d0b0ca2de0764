"""Text -> windows of token ids, in the one way that perplexities are comparable.

Each window begins as the tokenizer begins a text. A model that has only ever seen texts behind a start token is lost
without it: Gemma-3-270M finds WikiText-2 at a perplexity of 75 in windows that begin with a word, and of 40 in windows
that begin with `<bos>`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bitfold.errors import UsageError
from bitfold.text.chat import Renderer
from bitfold.text.documents import Render, is_text, split_column, text_pieces
from bitfold.text.mixes import JOINT, OWN, parts_of
from bitfold.text.shapes import conversation
from bitfold.text.start import start_name, text_start
from bitfold.text.stream import token_pieces

BUNDLED = Path(__file__).parent / "data" / "wikitext2-test.txt"
CALIBRATION = BUNDLED.with_name("wikitext2-valid.txt")
CODE, DIALOGUE = "code", "dialogue"
DEFAULT_CONTEXT = 2048
DEFAULT_MAX_TOKENS = 20480
_DIGESTED = 1 << 26  # bytes


@dataclass(frozen=True)
class Windows:
    """Token ids cut into windows of equal length.

    Args:
        ids: int64 (windows, context), start tokens included.
        stride: tokens of the text between the starts of two windows, at most the context without start tokens.
        start: what each window begins with: given, not predicted.
    """

    ids: torch.Tensor
    stride: int
    start: tuple[int, ...] = ()

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def context(self) -> int:
        """Tokens of a window."""
        return int(self.ids.shape[1])

    def first(self, window: int) -> int:
        """First position of the window whose prediction counts: those before were predicted in an earlier window."""
        after_start = max(0, len(self.start) - 1)
        return after_start if window == 0 else max(after_start, self.context - 1 - self.stride)

    def scored(self, window: int) -> int:
        """Predictions of the window that count; the last position predicts nothing that the window holds."""
        return self.context - 1 - self.first(window)

    @property
    def total(self) -> int:
        """Predictions that count in all windows."""
        return sum(self.scored(i) for i in range(len(self)))

    def head(self, tokens: int) -> Windows:
        """The first windows, `tokens` in all; of a single one only so many tokens of it."""
        context = min(self.context, max(tokens, len(self.start) + 2))
        windows = max(1, tokens // context)
        return Windows(self.ids[:windows, :context], min(self.stride, context - len(self.start)), self.start)

    def digest(self) -> str:
        """Hash of the ids and how they are cut."""
        head = f"{tuple(self.ids.shape)} {self.stride} {len(self.start)} ".encode()
        return hashlib.sha256(head + self.ids.contiguous().numpy().tobytes()).hexdigest()


def read_tokens(
    text: str | os.PathLike[str] | None, tokenizer: Any, *, enough: int | None, split: str = "test"
) -> torch.Tensor:
    """int64 (tokens,): the ids of a text, from its start as far as they are needed; no more of it is read.

    Args:
        text: see `documents.text_pieces`; None or "default": the excerpt of WikiText-2 that comes with the package, of
            the test split or the validation split (where `split` is "train"); "code": bitfold's own sources;
            "dialogue": conversations that come with it.
        tokenizer: of transformers; its chat template writes conversations out.
        enough: tokens that are needed; None: all.
        split: of a data set, where its name does not say.

    Raises:
        UsageError: no such file, one that is no text and no data whose columns are known, or an empty one.
        CheckpointError, HubError: a data set that cannot be read.
    """
    path = (BUNDLED if split == "test" else CALIBRATION) if text is None or str(text) == "default" else text
    start = text_start(tokenizer)
    seen: list[bool] = []
    render = Renderer(tokenizer, start_name(start, tokenizer) or "")
    if str(path) == DIALOGUE:
        pieces = own_dialogue(render)
    else:
        pieces = own_sources() if str(path) == CODE else text_pieces(path, split=split, render=render)
    ids = _gathered(_noted(pieces, seen), tokenizer, start, enough)
    if not any(seen):
        raise UsageError("the text is empty", where=text_name(text))
    return ids


def require_text(spec: str) -> None:
    """UsageError where a text that is named is not there; nothing is read, or fetched."""
    for part in parts_of(spec):
        if part.spec not in (*OWN, "self"):
            text_pieces(part.spec, split="train", render=Renderer(None, ""))


def _noted(pieces: Iterator[str], seen: list[bool]) -> Iterator[str]:
    """The pieces, noting whether there is more than spaces in them."""
    for piece in pieces:
        if not any(seen):
            seen.append(bool(piece.strip()))
        yield piece


def _gathered(pieces: Iterable[str], tokenizer: Any, start: tuple[int, ...], enough: int | None) -> torch.Tensor:
    parts: list[torch.Tensor] = []
    count = 0
    for ids in token_pieces(pieces, tokenizer):
        own = len(start) if start and not count and tuple(ids[: len(start)]) == start else 0
        parts.append(torch.tensor(ids[own:], dtype=torch.int64))
        count += len(parts[-1])
        if enough is not None and count >= enough:
            break
    return torch.cat([torch.empty(0, dtype=torch.int64), *parts])[:enough]


def own_sources() -> Iterator[str]:
    """Python that every installation has: bitfold's own modules, one after the other."""
    folder = Path(__file__).parents[1]
    for file in sorted(folder.rglob("*.py")):
        yield f"# {file.relative_to(folder.parent).as_posix()}\n{file.read_text(encoding='utf-8')}\n\n"


def own_dialogue(render: Render) -> Iterator[str]:
    """Conversations, written out by the chat template; without one, behind the names of who speaks."""
    for number, line in enumerate(BUNDLED.with_name("dialogue.jsonl").read_text(encoding="utf-8").splitlines(), 1):
        found = conversation(json.loads(line)["messages"])
        plain = "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in found.messages)
        written = render(replace(found, plain=plain), DIALOGUE, f"conversation {number}")
        yield f"{plain}\n\n\n" if written is None else written


def text_digest(text: str) -> str:
    """Hash that changes with the part of a text that is read: of the name itself, where that is no file.

    Windows are taken from the start; of a file larger than 64 MiB the rest counts by its size.
    """
    if len(parts := parts_of(text)) > 1:
        return JOINT.join(f"{text_digest(part.spec)}:{part.weight}" for part in parts)
    named, column = split_column(parts[0].spec)
    path = Path(named).expanduser()
    if is_text(text) or not path.is_file():
        return parts[0].spec
    with path.open("rb") as stream:
        digest = hashlib.sha256(f"{path.stat().st_size} ".encode() + stream.read(_DIGESTED)).hexdigest()
    return digest if column is None else f"{digest}#{column}"


def text_name(text: str | os.PathLike[str] | None) -> str:
    """How reports call the text: the name of the file, or "(given)" for a text that was passed itself."""
    for path, names in ((BUNDLED, ("None", "default")), (CALIBRATION, (str(CALIBRATION),))):
        if str(text) in names:
            return f"{path.name} (excerpt in the package)"
    return "(given)" if is_text(text) else str(text)


def read_lines(text: str | os.PathLike[str] | None) -> list[str]:
    """The lines of a text (see `documents.text_pieces`) that are not empty; UsageError where there are none."""
    path = BUNDLED if text is None or str(text) == "default" else text
    whole = "".join(text_pieces(path, split="test", render=Renderer(None, "")))
    if lines := [line.strip() for line in whole.splitlines() if line.strip()]:
        return lines
    raise UsageError("the text is empty", where=text_name(text))


def tokenize(text: str, tokenizer: Any) -> torch.Tensor:
    """int64 (tokens,): the ids of the text alone; a start token that it brings along is left to the windows."""
    return _gathered([text], tokenizer, text_start(tokenizer), None)


def cut(
    ids: torch.Tensor, context: int, stride: int | None, max_tokens: int | None, start: tuple[int, ...] = ()
) -> Windows:
    """Windows of `context` tokens over the first `max_tokens` ids, `stride` apart (None: side by side).

    Args:
        ids: int64 (tokens,) of the text alone, see `tokenize`.
        context: tokens of a window, with its start.
        stride: tokens of the text between the starts of two windows.
        max_tokens: of the text.
        start: what each window begins with, see `text_start`.

    A rest shorter than a window is left out.

    Raises:
        UsageError: impossible sizes, or a text shorter than one window.
    """
    own = context - len(start)  # tokens of the text in a window
    if context < 2 or own < 1:
        raise UsageError(f"a window needs at least {max(2, len(start) + 1)} tokens, not {context}", where="context")
    if stride is not None and not 1 <= stride <= context:
        raise UsageError(f"the stride must be between 1 and the context, {context}, not {stride}", where="stride")
    if max_tokens is not None and max_tokens < context:
        hint = f"more tokens, or a context of at most {max_tokens}"
        raise UsageError(f"fewer than one window of {context} tokens", where=f"max_tokens = {max_tokens}", hint=hint)
    if ids.numel() < own:
        longest = ids.numel() + len(start)
        raise UsageError(
            f"the text has {ids.numel()} tokens, fewer than one window of {context}",
            hint=f"give a longer text, or a context of at most {longest}",
        )
    stride = min(own if stride is None else stride, own)
    windows = ids[:max_tokens].unfold(0, own, stride)
    before = torch.tensor(start, dtype=torch.int64).expand(len(windows), -1)
    return Windows(torch.cat([before, windows], 1), stride, start)
