"""Text -> windows of token ids, in the one way that perplexities are comparable."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitfold.errors import UsageError
from bitfold.text.documents import documents

BUNDLED = Path(__file__).parent / "data" / "wikitext2-test.txt"
CALIBRATION = BUNDLED.with_name("wikitext2-valid.txt")
DEFAULT_CONTEXT = 2048
DEFAULT_MAX_TOKENS = 20480


@dataclass(frozen=True)
class Windows:
    """Token ids cut into windows of equal length.

    Args:
        ids: int64 (windows, context).
        stride: tokens between the starts of two windows, at most the context.
    """

    ids: torch.Tensor
    stride: int

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def context(self) -> int:
        """Tokens of a window."""
        return int(self.ids.shape[1])

    def first(self, window: int) -> int:
        """First position of the window whose prediction counts: those before were predicted in an earlier window."""
        return 0 if window == 0 else max(0, self.context - 1 - self.stride)

    def scored(self, window: int) -> int:
        """Predictions of the window that count; the last position predicts nothing that the window holds."""
        return self.context - 1 - self.first(window)

    @property
    def total(self) -> int:
        """Predictions that count in all windows."""
        return sum(self.scored(i) for i in range(len(self)))

    def digest(self) -> str:
        """Hash of the ids and how they are cut."""
        head = f"{tuple(self.ids.shape)} {self.stride} ".encode()
        return hashlib.sha256(head + self.ids.contiguous().numpy().tobytes()).hexdigest()


def read_text(text: str | os.PathLike[str] | None, *, enough: int | None = None) -> str:
    """The text itself, or what `text` names; None or "default": the excerpt that comes with the package.

    Args:
        text: a file or a data set, see `documents.documents` (split `test` where the name says no other), its documents
            joined by empty lines; or a text with a line break in it, or longer than a path.
        enough: characters after which a data set need not be read further.

    Raises:
        UsageError: no such file, one that cannot be read as text, or an empty one; a data set without the extra `eval`.
        CheckpointError, HubError: a data set that cannot be read.
    """
    if isinstance(text, str) and _is_text(text):
        return text
    path = BUNDLED if text is None or str(text) == "default" else text
    content = _joined(documents(path, split="test"), enough)
    if not content.strip():
        raise UsageError("the text is empty", where=str(path))
    return content


def _joined(documents: Iterator[str], enough: int | None) -> str:
    parts, length = [], 0
    for document in documents:
        parts.append(document)
        length += len(document) + 2
        if enough is not None and length > enough:
            break
    return "\n\n".join(parts)


def text_name(text: str | os.PathLike[str] | None) -> str:
    """How reports call the text: the name of the file, or "(given)" for a text that was passed itself."""
    for path, names in ((BUNDLED, ("None", "default")), (CALIBRATION, (str(CALIBRATION),))):
        if str(text) in names:
            return f"{path.name} (excerpt in the package)"
    return "(given)" if isinstance(text, str) and _is_text(text) else str(text)


def _is_text(text: str) -> bool:
    return "\n" in text or len(text) > 1000


def read_lines(text: str | os.PathLike[str] | None) -> list[str]:
    """The lines of a text or file (see `read_text`) that are not empty."""
    return [line.strip() for line in read_text(text).splitlines() if line.strip()]


def tokenize(text: str, tokenizer: Any) -> torch.Tensor:
    """int64 (tokens,): the ids of the text alone, no begin-of-text or other special token added."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def cut(ids: torch.Tensor, context: int, stride: int | None, max_tokens: int | None) -> Windows:
    """Windows of `context` tokens over the first `max_tokens` ids, `stride` apart (None: side by side).

    A rest shorter than a window is left out.

    Raises:
        UsageError: impossible sizes, or a text shorter than one window.
    """
    stride = context if stride is None else stride
    if context < 2:
        raise UsageError(f"a window needs at least 2 tokens, not {context}", where="context")
    if not 1 <= stride <= context:
        raise UsageError(f"the stride must be between 1 and the context, {context}, not {stride}", where="stride")
    if max_tokens is not None and max_tokens < context:
        raise UsageError(f"fewer than one window of {context} tokens", where=f"max_tokens = {max_tokens}")
    if ids.numel() < context:
        raise UsageError(
            f"the text has {ids.numel()} tokens, fewer than one window of {context}",
            hint=f"give a longer text, or a context of at most {ids.numel()}",
        )
    return Windows(ids[:max_tokens].unfold(0, context, stride).contiguous(), stride)
