"""How a model reads a text: every prediction that counts, in order, a few rows of logits at a time.

The logits of a window of 2048 tokens over a vocabulary of 128 thousand are a gigabyte. So the output head is applied to
a few positions at a time: a hook keeps the hidden states and lets the model compute the last position only, which
also shows whether the model does anything to the logits after the head (soft-capping, scaling). If it does, the
logits are taken whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from bitfold.errors import ModelError, UsageError
from bitfold.evaluation.by_engine import by_engine
from bitfold.text.start import text_ends
from bitfold.text.windows import Windows

PIECE_BYTES = 1 << 25  # of float32 logits at a time: scoring makes some eight temporaries of this size
LARGEST_PIECE = 256  # rows
MASK_EVERY = 8


@dataclass(frozen=True)
class Piece:
    """Predictions that count.

    Args:
        logits: float32 (rows, vocabulary), on the CPU.
        targets: int64 (rows,), what the text says.
        window: of the text.
    """

    logits: torch.Tensor
    targets: torch.Tensor
    window: int


class Passages(Protocol):
    """A text, cut into what a model reads at once."""

    @property
    def total(self) -> int:
        """Predictions that count."""
        ...

    @property
    def context(self) -> int:
        """Tokens of a window."""
        ...

    @property
    def tokens(self) -> torch.Tensor:
        """int64: all ids that the model will see."""
        ...

    @property
    def start(self) -> tuple[int, ...]:
        """Token ids that each window begins with, whatever the text."""
        ...

    def __len__(self) -> int: ...

    def digest(self) -> str:
        """Hash of the tokens, and of which predictions count."""
        ...

    def counted(self, some: range) -> int:
        """Predictions that count in some of the windows."""
        ...

    def read(self, model: nn.Module, batch: int, some: range | None = None) -> Iterator[Piece]:
        """Run the model over the text, or over some of its windows."""
        ...


@dataclass(frozen=True)
class Portion:
    """Some neighbouring windows of a text, read as they are within the whole.

    Args:
        whole: the text.
        some: its windows; the first one is the first of a batch.
    """

    whole: Passages
    some: range

    @property
    def total(self) -> int:
        """Predictions that count."""
        return self.whole.counted(self.some)

    @property
    def context(self) -> int:
        """Tokens of a window."""
        return self.whole.context

    @property
    def tokens(self) -> torch.Tensor:
        """See `Passages`: those of the whole text."""
        return self.whole.tokens

    @property
    def start(self) -> tuple[int, ...]:
        """See `Passages`."""
        return self.whole.start

    def __len__(self) -> int:
        return len(self.some)

    def digest(self) -> str:
        """See `Passages`."""
        return hashlib.sha256(f"{self.whole.digest()} {self.some}".encode()).hexdigest()

    def counted(self, some: range) -> int:
        """See `Passages`."""
        return self.whole.counted(self.some[some.start : some.stop])

    def read(self, model: nn.Module, batch: int, some: range | None = None) -> Iterator[Piece]:
        """See `Passages`; the windows of pieces are numbered as in the whole."""
        return self.whole.read(model, batch, self.some if some is None else self.some[some.start : some.stop])


@dataclass(frozen=True)
class CausalPassages:
    """Every token of a window is predicted from those before it."""

    windows: Windows

    @property
    def total(self) -> int:
        """Predictions that count."""
        return self.windows.total

    @property
    def context(self) -> int:
        """Tokens of a window."""
        return self.windows.context

    @property
    def tokens(self) -> torch.Tensor:
        """See `Passages`."""
        return self.windows.ids

    @property
    def start(self) -> tuple[int, ...]:
        """See `Passages`."""
        return self.windows.start

    def __len__(self) -> int:
        return len(self.windows)

    def digest(self) -> str:
        """See `Passages`."""
        return self.windows.digest()

    def counted(self, some: range) -> int:
        """See `Passages`."""
        return sum(self.windows.scored(i) for i in some)

    @torch.no_grad()
    def read(self, model: nn.Module, batch: int, some: range | None = None) -> Iterator[Piece]:
        """See `Passages`."""
        windows, size = self.windows, piece_rows(model)
        some = range(len(windows)) if some is None else some
        reader = by_engine(model, windows.context, size) or _HeadInPieces(model)
        for first in range(some.start, some.stop, batch):
            ids = windows.ids[first : min(first + batch, some.stop)]
            with reader.run(ids) as rows:
                for offset in range(len(ids)):
                    window = first + offset
                    for start in range(windows.first(window), windows.context - 1, size):
                        stop = min(start + size, windows.context - 1)
                        targets = windows.ids[window, start + 1 : stop + 1]
                        yield Piece(rows(offset, start, stop), targets, window)


@dataclass(frozen=True)
class MaskedPassages:
    """Every n-th token of a window is hidden, each in a copy of its own, and predicted from all others.

    The measure of Salazar et al. 2020 (pseudo-log-likelihood), on a sample of the positions: their offset moves with
    the window, so that all places of a window are met.

    Args:
        ids: int64 (windows, context), special tokens of the ends included.
        edges: how many tokens at the start and at the end are special.
        mask: id of the mask token.
        every: a token of so many is hidden.
    """

    ids: torch.Tensor
    edges: tuple[int, int]
    mask: int
    every: int = MASK_EVERY

    @property
    def total(self) -> int:
        """Predictions that count."""
        return self.counted(range(len(self)))

    @property
    def context(self) -> int:
        """Tokens of a window."""
        return int(self.ids.shape[1])

    @property
    def tokens(self) -> torch.Tensor:
        """See `Passages`."""
        return torch.cat([self.ids.flatten(), torch.tensor([self.mask])])

    @property
    def start(self) -> tuple[int, ...]:
        """See `Passages`."""
        return tuple(self.ids[0, : self.edges[0]].tolist())

    def __len__(self) -> int:
        return len(self.ids)

    def _hidden(self, window: int) -> torch.Tensor:
        first, last = self.edges[0], self.context - self.edges[1]
        return torch.arange(first + window % self.every, last, self.every)

    def digest(self) -> str:
        """See `Passages`."""
        head = f"masked {tuple(self.ids.shape)} {self.edges} {self.mask} {self.every} ".encode()
        return hashlib.sha256(head + self.ids.contiguous().numpy().tobytes()).hexdigest()

    def counted(self, some: range) -> int:
        """See `Passages`."""
        return sum(len(self._hidden(w)) for w in some)

    @torch.no_grad()
    def read(self, model: nn.Module, batch: int, some: range | None = None) -> Iterator[Piece]:
        """See `Passages`; `batch` is the number of copies at once, at least a handful."""
        for window in range(len(self)) if some is None else some:
            for places in torch.split(self._hidden(window), max(batch, MASK_EVERY)):
                copies = self.ids[window].repeat(len(places), 1)
                copies[torch.arange(len(places)), places] = self.mask
                yield Piece(_masked_logits(model, copies, places), self.ids[window, places], window)


def masked_passages(ids: torch.Tensor, tokenizer: Any, context: int, max_tokens: int | None) -> MaskedPassages:
    """Windows for a masked language model, with the special tokens it expects at the ends.

    Raises:
        UsageError: a tokenizer without a mask token, or a text shorter than one window.
    """
    if tokenizer.mask_token_id is None:
        raise UsageError("the tokenizer has no mask token", hint="is it a masked language model?")
    ends = text_ends(tokenizer)
    body = context - len(ends[0]) - len(ends[1])
    ids = ids[:max_tokens]
    if body < 1 or len(ids) < body:
        raise UsageError(
            f"the text has {len(ids)} tokens, one window needs {max(body, 1)}", hint="give more text, or less context"
        )
    windows = ids[: len(ids) // body * body].view(-1, body)
    sides = [torch.tensor(end, dtype=torch.int64).expand(len(windows), -1) for end in ends]
    whole = torch.cat([sides[0], windows, sides[1]], 1)
    return MaskedPassages(whole, (len(ends[0]), len(ends[1])), int(tokenizer.mask_token_id))


def piece_rows(model: nn.Module) -> int:
    """How many rows of logits to handle at once, by the size of the model's vocabulary."""
    config: Any = getattr(model, "config", None)
    vocabulary = getattr(getattr(config, "text_config", None) or config, "vocab_size", None)
    return LARGEST_PIECE if not vocabulary else min(LARGEST_PIECE, max(1, PIECE_BYTES // (4 * int(vocabulary))))


def _device(model: nn.Module) -> torch.device:
    return next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))


def _head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    try:
        head = getter() if callable(getter) else None
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


def _logits_of(output: Any, model: nn.Module) -> torch.Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 3:
        raise ModelError("the model does not predict a token for every position", where=type(model).__name__)
    return logits


def _masked_logits(model: nn.Module, copies: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """float32 (copies, vocabulary): the head sees the hidden positions only."""
    device, index = _device(model), torch.arange(len(places))
    found: list[int] = []

    def pick(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if inputs[0].dim() != 3:
            return None
        found.append(1)
        return (inputs[0][index.to(device), places.to(device)][:, None], *inputs[1:])

    head = _head(model)
    handle = head.register_forward_pre_hook(pick) if head is not None else None
    try:
        logits = _logits_of(model(input_ids=copies.to(device)), model)
    finally:
        if handle is not None:
            handle.remove()
    rows = logits[:, 0] if found else logits[index.to(device), places.to(device)]
    return rows.detach().float().cpu()


class _Rows(Protocol):
    def __call__(self, row: int, start: int, stop: int) -> torch.Tensor: ...


class _HeadInPieces:
    """Runs a model and hands out its logits a few positions at a time."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.device, self.head = model, _device(model), _head(model)

    @contextmanager
    def run(self, ids: torch.Tensor) -> Iterator[_Rows]:
        """A function (row of `ids`, start, stop) -> float32 logits (stop - start, vocabulary) on the CPU."""
        hidden = self._hidden(ids.to(self.device)) if self.head is not None else None
        if hidden is not None:
            head, states = self.head, hidden
            assert head is not None
            yield lambda row, start, stop: head(states[row : row + 1, start:stop])[0].detach().float().cpu()
            return
        logits = _logits_of(self.model(input_ids=ids.to(self.device), use_cache=False), self.model)
        if logits.shape[1] != ids.shape[1]:
            raise ModelError("the model does not predict a token for every position", where=type(self.model).__name__)
        yield lambda row, start, stop: logits[row, start:stop].detach().float().cpu()

    def _hidden(self, ids: torch.Tensor) -> torch.Tensor | None:
        """What goes into the head, (batch, context, width); None (from then on) where that is not the whole story."""
        assert self.head is not None
        caught: list[torch.Tensor] = []

        def last_only(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            caught.append(inputs[0])
            return (inputs[0][:, -1:], *inputs[1:])

        handle = self.head.register_forward_pre_hook(last_only)
        try:
            logits = getattr(self.model(input_ids=ids, use_cache=False), "logits", None)
        finally:
            handle.remove()
        whole = len(caught) == 1 and caught[0].dim() == 3 and caught[0].shape[:2] == ids.shape
        if whole and isinstance(logits, torch.Tensor):
            again = self.head(caught[0][:, -1:])
            if again.shape == logits.shape and torch.allclose(again.float(), logits.float(), rtol=1e-6, atol=0):
                return caught[0]
        self.head = None  # something happens to the logits after the head
        return None
