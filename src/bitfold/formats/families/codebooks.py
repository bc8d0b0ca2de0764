"""Additive codebooks: a vector of 8 weights as the sum of one entry of each of a few books.

Training is residual k-means, then alternating beam search (which entries) and least squares (what they are). Books are
float32 (M, entries, 8), codes int64 (vectors, M), all distances Euclidean; a metric D = L L^T is had by multiplying
vectors and books by L first.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH = 8
_SAMPLE = 1 << 14  # vectors that books are trained on
_CHUNK = 1 << 13  # vectors searched at a time
_LLOYD = 8  # rounds of k-means for each book
_ROUNDS = 3  # of search and least squares
BEAM = 4


def values_of(books: Tensor, codes: Tensor) -> Tensor:
    """float32 (vectors, 8): the sums that codes (vectors, M) name."""
    out = books[0][codes[:, 0]]
    for book, column in zip(books[1:], codes.T[1:], strict=True):
        out = out + book[column]
    return out


def beam_search(x: Tensor, books: Tensor, start: Tensor | None = None, *, beam: int = BEAM) -> Tensor:
    """Codes whose sums come near x (vectors, 8), book after book, the `beam` best choices so far kept.

    Args:
        x: what to approximate.
        books: the books.
        start: codes (vectors, M) to improve; None = begin with none, take the books in turn, then each again.
        beam: choices kept. One of them is always the greedy one (each book's best entry, the others fixed), so that the
            result is never worse than that of beam 1, nor than the start.
    """
    if len(x) > _CHUNK:
        starts = [None] * len(x) if start is None else torch.split(start, _CHUNK)
        pieces = zip(torch.split(x, _CHUNK), starts, strict=False)
        return torch.cat([beam_search(piece, books, begun, beam=beam) for piece, begun in pieces])
    state = _Beam(x, books, start)
    if start is None:
        for m in range(len(books)):
            state.step(m, beam, replace=False)
    if start is not None or len(books) > 1:
        for m in range(len(books)):
            state.step(m, beam, replace=True)
    return state.best()


class _Beam:
    """Several choices of codes for each vector; the first one is the greedy one."""

    def __init__(self, x: Tensor, books: Tensor, start: Tensor | None) -> None:
        self._books, self._norms = books, books.square().sum(-1)
        self._codes = torch.zeros(len(x), 1, len(books), dtype=torch.int64) if start is None else start[:, None].clone()
        rest = x if start is None else x - values_of(books, start)
        self._rest = rest[:, None]  # (vectors, choices, 8): what the codes leave over

    def step(self, m: int, beam: int, *, replace: bool) -> None:
        """Choose the entry of book m anew in every choice, and keep the best."""
        rest = self._rest + self._books[m][self._codes[:, :, m]] if replace else self._rest
        count, choices, _ = rest.shape
        entries = len(self._books[m])
        # |rest - entry|^2; the square of rest tells choices apart.
        cost = torch.addmm(self._norms[m], rest.reshape(-1, WIDTH), self._books[m].T, alpha=-2)
        cost.view(count, choices, entries).add_(rest.square().sum(-1, keepdim=True))
        cost = cost.view(count, -1)
        greedy = cost[:, :entries].argmin(1, keepdim=True)
        kept = greedy
        if beam > 1:
            cost.scatter_(1, greedy, torch.inf)
            others = cost.topk(min(beam, entries) - 1, dim=1, largest=False, sorted=False).indices
            kept = torch.cat([greedy, others], 1)
        parent, entry = kept // entries, kept % entries
        rows = torch.arange(count)[:, None]
        self._codes = self._codes[rows, parent]
        self._codes[:, :, m] = entry
        self._rest = rest[rows, parent] - self._books[m][entry]

    def best(self) -> Tensor:
        """int64 (vectors, M)."""
        found = self._rest.square().sum(-1).argmin(1)
        return self._codes[torch.arange(len(found)), found]


def train_books(x: Tensor, books: int, entries: int, seed: int) -> Tensor:
    """float32 (books, entries, 8) for vectors like x (vectors, 8).

    Deterministic for a seed. Fewer vectors than entries leave the last entries zero.
    """
    generator = torch.Generator().manual_seed(seed)
    if len(x) > _SAMPLE:
        x = x[torch.randperm(len(x), generator=generator)[:_SAMPLE]]
    rest, found = x, []
    for _ in range(books):
        book = _kmeans(rest, entries, generator)
        rest = rest - book[_nearest(rest, book)]
        found.append(book)
    trained = torch.stack(found)
    for _ in range(_ROUNDS if books > 1 else 0):
        trained = least_squares(x, beam_search(x, trained, beam=2), trained)
    return trained


def least_squares(x: Tensor, codes: Tensor, books: Tensor) -> Tensor:
    """The books that fit x (vectors, 8) best under these codes; entries that nobody takes stay as they are."""
    count, entries = len(books), books.shape[1]
    index = codes + torch.arange(count) * entries
    gram = torch.zeros(count * entries, count * entries)
    for a in range(count):
        for b in range(count):
            pair = index[:, a] * (count * entries) + index[:, b]
            gram.view(-1).index_add_(0, pair, torch.ones(len(pair)))
    target = torch.zeros(count * entries, WIDTH).index_add_(0, index.flatten(), x.repeat_interleave(count, 0))
    old = books.reshape(-1, WIDTH)
    # A little of the old books: the sums fix the books only up to shifts from one to another.
    ridge = 1e-3 * gram.diagonal().mean()
    gram.diagonal().add_(ridge)
    found: Tensor = torch.linalg.solve(gram, target + ridge * old)
    return found.view_as(books)


def _kmeans(x: Tensor, entries: int, generator: torch.Generator) -> Tensor:
    """float32 (entries, 8): Lloyd's algorithm; an entry that nobody takes moves to where the error is largest."""
    book = torch.zeros(entries, WIDTH)
    first = torch.randperm(len(x), generator=generator)[:entries]
    book[: len(first)] = x[first]
    for _ in range(_LLOYD if len(x) > entries else 0):
        codes = _nearest(x, book)
        counts = torch.bincount(codes, minlength=entries).float()
        sums = torch.zeros_like(book).index_add_(0, codes, x)
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty):
            far = (x - book[codes]).square().sum(1).topk(len(empty)).indices
            sums[empty], counts[empty] = x[far], 1.0
        book = sums / counts[:, None]
    return book


def _nearest(x: Tensor, book: Tensor) -> Tensor:
    norms = book.square().sum(1)
    parts = [torch.addmm(norms, part, book.T, alpha=-2).argmin(1) for part in torch.split(x, _CHUNK)]
    return torch.cat(parts)
