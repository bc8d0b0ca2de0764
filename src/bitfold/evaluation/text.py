"""Text -> windows of token ids, in the one way that perplexities are comparable."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitfold.errors import CheckpointError, UsageError

BUNDLED = Path(__file__).parent.parent / "data" / "wikitext2-test.txt"
CALIBRATION = BUNDLED.with_name("wikitext2-valid.txt")
DEFAULT_CONTEXT = 2048
DEFAULT_MAX_TOKENS = 20480
_DATASET = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]*){0,2}")


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
        text: a UTF-8 file; a .jsonl file with a `text` in each line; a data set of the Hub, "org/name",
            "org/name:configuration" or "org/name:configuration:split" (default: test); or a text with a line break
            in it, or longer than a path. Documents are joined by empty lines.
        enough: characters after which a data set need not be read further.

    Raises:
        UsageError: no such file, or one that cannot be read as text; a data set without the extra `eval`.
        CheckpointError: a data set that cannot be read.
    """
    if isinstance(text, str) and _is_text(text):
        return text
    path = BUNDLED if text is None or str(text) == "default" else Path(text).expanduser()
    if not path.is_file():
        if _DATASET.fullmatch(str(text)) and path.suffix not in (".txt", ".jsonl", ".md"):
            return _joined(_dataset(str(text)), enough)
        raise UsageError("no such text file", where=str(path), hint="give a UTF-8 text file")
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot be read as UTF-8 text: {error}", where=str(path)) from error
    return _joined(_json_lines(content, path), enough) if path.suffix == ".jsonl" else content


def _joined(documents: Iterator[str], enough: int | None) -> str:
    parts, length = [], 0
    for document in documents:
        parts.append(document)
        length += len(document) + 2
        if enough is not None and length > enough:
            break
    return "\n\n".join(parts)


def _json_lines(content: str, path: Path) -> Iterator[str]:
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"line {number} has no `text`: {error}", where=str(path)) from error
        if not isinstance(text, str):
            raise UsageError(f"the `text` of line {number} is no text", where=str(path))
        yield text


def _dataset(spec: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UsageError(
            "is no file, and data sets of the Hub need an extra", where=spec, hint="pip install 'bitfold[eval]'"
        ) from error
    name, configuration, split = [*spec.split(":"), "", ""][:3]
    try:
        for row in load_dataset(name, configuration or None, split=split or "test", streaming=True):
            yield str(row["text"])
    except KeyError as error:
        raise CheckpointError(f"the data set has no column {error}", where=spec) from error
    except Exception as error:  # whatever the network, the Hub and the data set's own format come up with
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"the data set cannot be read: {first}", where=spec, hint="is it a file? then check the path"
        ) from error


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
