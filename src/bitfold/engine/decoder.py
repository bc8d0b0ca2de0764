"""The native decoder of a loaded model: tokens in, logits out, a cache that is allocated once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitfold.engine.plan import NativePlan, Unsupported, make_plan
from bitfold.errors import UsageError
from bitfold.system import native

__all__ = ["Decoder", "Unsupported"]

_Span = tuple[int, int, int, int]  # sequence, position, tokens, of which the last are wanted

CACHES = ("auto", "f16", "bf16", "int8", "int4")
_SHORT = 4096  # tokens up to which memory and reading of 16 bits matter little
_LEAST_FOR_INT4 = 10**9  # weights
_INT4_LOSS = "0.2"  # nats a token
_GATHERED = 8 << 20  # bytes: stacks of threads, what libraries set up when they first work, the token ids themselves
CHUNK = 256  # tokens in one call: between calls Ctrl-C is heard


class Decoder:
    """A causal language model at work in the native core, on one sequence or several.

    Weights stay as they are in the model, which must not be changed or moved meanwhile. All is computed in float32, or
    with activations rounded to 8 bits where the weights ask for it. Layers with a sliding window keep only what it
    needs.

    Args:
        model: of a family in `FAMILIES`, with weights on the CPU.
        positions: the longest text of a sequence, in tokens.
        threads: None: as many as PyTorch has been given.
        sequences: texts that are kept side by side; each has a cache of its own.
        cache: how keys and values are kept: "f16"; "bf16"; "int8": one scale for each head and token, under a Hadamard
            rotation where a head has a power of two of channels; "int4": the same, for models of a billion weights and
            more; "auto": f16 for texts of up to 4096 tokens, int8 for longer ones where it costs less than 0.001 nats a
            token: not where keys have a bias, as those of Qwen2.

    Raises:
        Unsupported: the engine has no code for this model, and why.
        UsageError: no sequences; a cache that there is not, or not for this model.
    """

    def __init__(
        self,
        model: nn.Module,
        positions: int,
        threads: int | None = None,
        sequences: int = 1,
        cache: str = "auto",
    ) -> None:
        if sequences < 1:
            raise UsageError("a decoder has at least one sequence")
        if cache not in CACHES:
            raise UsageError(f"unknown cache {cache!r}", where="--cache", hint=", ".join(CACHES))
        self._plan = make_plan(model, positions)
        core = native.core()
        assert core is not None
        if cache == "int4":
            _require_int4(self._plan)
        if cache == "auto":
            cache = "f16" if positions <= _SHORT or self._plan.biased_keys else "int8"
        self.cache = cache
        kind = getattr(core.CacheKind, cache)
        self._native = core.Decoder(self._plan.plan, threads or native.threads(), sequences, kind)
        self.texts: list[list[int]] = [[] for _ in range(sequences)]
        self._reach = [0] * sequences  # tokens that were read since each began: what windows hold is the end of them

    guesses = True  # tokens can be taken back: `texts` is shortened

    @property
    def ids(self) -> list[int]:
        """Tokens of the first sequence."""
        return self.texts[0]

    @property
    def positions(self) -> int:
        """The longest text, in tokens."""
        return self._plan.positions

    @property
    def vocabulary(self) -> int:
        """How many logits there are."""
        return int(self._plan.plan.vocabulary)

    @property
    def token_bytes(self) -> int:
        """Bytes of the weights that every token reads."""
        return self._plan.nbytes

    @property
    def cache_bytes(self) -> int:
        """Memory of keys and values of all sequences, when they are full."""
        return int(self._native.cache_bytes)

    @property
    def working_bytes(self) -> int:
        """Memory that reading takes besides the model and the cache: activations of 256 tokens, scales in the order of
        the loops, rotary angles of all positions."""
        return int(self._native.working_bytes) + self._plan.own_bytes

    def keep(self, ids: Sequence[int], sequence: int = 0) -> int:
        """Forget of a sequence what does not begin as `ids` does; how many tokens are left.

        At least the last token of `ids` is forgotten, for its logits are wanted.
        """
        text, common = self.texts[sequence], 0
        for old, new in zip(text, ids[:-1], strict=False):
            if old != new:
                break
            common += 1
        if not self._reaches(sequence, common):
            common = 0
        del text[common:]
        return common

    def _reaches(self, sequence: int, tokens: int) -> bool:
        """Whether layers with a window still have what the end of that beginning sees."""
        return self._reach[sequence] - tokens <= int(self._native.slack)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """The first tokens of one sequence become those of another, whose text is forgotten.

        None become so where layers have a sliding window and the source went far beyond them: it keeps no more.

        Raises:
            UsageError: the source has not so many tokens, or is the target.
        """
        if source == target or not 0 <= tokens <= len(self.texts[source]):
            raise UsageError(f"cannot copy {tokens} tokens from sequence {source} to {target}")
        tokens = tokens if self._reaches(source, tokens) else 0
        self._native.copy(source, target, tokens)
        self.texts[target] = self.texts[source][:tokens]
        self._reach[target] = self._reach[source]

    def saved(self, sequence: int = 0) -> Tensor:
        """Keys and values of a sequence as uint8 bytes, for `load`."""
        count = len(self.texts[sequence])
        out = torch.empty(self._native.saved_bytes(count), dtype=torch.uint8)
        self._native.save(sequence, count, out.data_ptr())
        return out

    def load(self, ids: Sequence[int], saved: Tensor, sequence: int = 0) -> None:
        """Take `ids` as read, with the keys and values that `saved` gave for them.

        Raises:
            ValueError: these are not as many bytes as so many tokens have, or there is no room for them.
        """
        saved = saved.contiguous()
        if len(ids) > self.positions or saved.nbytes != self._native.saved_bytes(len(ids)):
            raise ValueError(f"it holds {len(ids)} tokens in {saved.nbytes} bytes, which do not fit")
        self._native.load(sequence, len(ids), saved.data_ptr())
        self.texts[sequence] = list(ids)
        self._reach[sequence] = len(ids)

    def extend(self, ids: Sequence[int], sequence: int = 0) -> Tensor:
        """Read tokens behind those that are there; float32 logits (vocabulary) of what follows the last of them.

        Raises:
            UsageError: no tokens, or more than there is room for.
        """
        return self.step([(sequence, ids)])[0]

    def step(self, work: Sequence[tuple[int, Sequence[int]]], wanted: Sequence[int] | None = None) -> Tensor:
        """Read new tokens of some sequences, every weight once for 256 of them, whosever they are.

        Args:
            work: (sequence, tokens behind those that it has); no sequence twice.
            wanted: behind how many of the last tokens of each logits are wanted; None: behind the last.

        Returns:
            float32 logits (rows, vocabulary), those of one sequence after those of the other.

        Raises:
            UsageError: no tokens, a sequence twice, or more tokens than there is room for.
        """
        return self._read(work, [1] * len(work) if wanted is None else wanted)

    def logits(self, ids: Sequence[int], sequence: int = 0) -> Tensor:
        """Read tokens; float32 logits (tokens, vocabulary) behind each of them. UsageError as `extend`."""
        return self._read([(sequence, ids)], [len(ids)])

    def _read(self, work: Sequence[tuple[int, Sequence[int]]], wanted: Sequence[int]) -> Tensor:
        out = torch.empty(sum(wanted), self.vocabulary)
        self._each(work, wanted, lambda spans, ids, row: self._native.run(spans, ids, out[row:].data_ptr()))
        return out

    def best(self, work: Sequence[tuple[int, Sequence[int]]], top: int = 1) -> tuple[Tensor, Tensor]:
        """As `step`, but of the logits only the largest, which the threads find while they make them.

        Args:
            work: as for `step`.
            top: how many.

        Returns:
            float32 logits (len(work), top), largest first, and int64 tokens; of equal ones the first.

        Raises:
            UsageError: as `step`, or more than there are tokens.
        """
        if not 1 <= top <= self.vocabulary:
            raise UsageError(f"cannot choose {top} of {self.vocabulary} tokens")
        values, found = torch.empty(len(work), top), torch.empty(len(work), top, dtype=torch.int32)

        def run(spans: list[_Span], ids: list[int], row: int) -> None:
            self._native.best(spans, ids, top, values[row:].data_ptr(), found[row:].data_ptr())

        self._each(work, [1] * len(work), run)
        return values, found.long()

    def _each(
        self,
        work: Sequence[tuple[int, Sequence[int]]],
        wanted: Sequence[int],
        run: Callable[[list[_Span], list[int], int], None],
    ) -> None:
        self._check(work)
        row = 0
        for pieces in _chunks(work, wanted):
            spans = [(p.sequence, len(self.texts[p.sequence]), len(p.ids), p.wanted) for p in pieces]
            run(spans, [token for p in pieces for token in p.ids], row)
            for p in pieces:
                text = self.texts[p.sequence]
                text += p.ids
                self._reach[p.sequence] = max(self._reach[p.sequence], len(text))
                row += p.wanted

    def _check(self, work: Sequence[tuple[int, Sequence[int]]]) -> None:
        if not work or not all(ids for _, ids in work):
            raise UsageError("there are no tokens to read")
        if len({sequence for sequence, _ in work}) < len(work):
            raise UsageError("a sequence can be named only once")
        for sequence, ids in work:
            if not 0 <= sequence < len(self.texts):
                raise UsageError(f"there is no sequence {sequence}, but {len(self.texts)} of them")
            if not self.texts[sequence]:
                self._reach[sequence] = 0
            if not self._reaches(sequence, len(self.texts[sequence])):
                raise UsageError(
                    "a text was shortened beyond what sliding windows keep; `keep` tells how far it can be"
                )
            size = len(self.texts[sequence]) + len(ids)
            if size > self.positions:
                raise UsageError(f"{size} tokens are more than the cache has room for, {self.positions}")


def _require_int4(plan: NativePlan) -> None:
    dim = int(plan.plan.dim)
    if dim < 32 or dim & (dim - 1):
        raise UsageError(f"4 bits are for heads of a power of two, not of {dim}", where="--cache", hint="int8")
    if plan.weights < _LEAST_FOR_INT4:
        raise UsageError(
            f"keys and values in 4 bits cost a model of {plan.weights / 1e6:.0f} million weights too much, some "
            f"{_INT4_LOSS} nats a token (docs/engine.md)",
            where="--cache",
            hint="int8; 4 bits are for models of a billion weights and more",
        )


@dataclass(frozen=True)
class _Piece:
    """Tokens of one sequence in one call, and behind how many of the last of them logits are wanted."""

    sequence: int
    ids: list[int]
    wanted: int


def _chunks(work: Sequence[tuple[int, Sequence[int]]], wanted: Sequence[int]) -> Iterator[list[_Piece]]:
    """Pieces of together at most CHUNK tokens; of each of `work` the last `wanted` ones."""
    pieces: list[_Piece] = []
    room = CHUNK
    for (sequence, ids), last in zip(work, wanted, strict=True):
        at = 0
        while at < len(ids):
            end = min(len(ids), at + room)
            pieces.append(_Piece(sequence, list(ids[at:end]), max(0, end - max(at, len(ids) - last))))
            room -= end - at
            at = end
            if room == 0:
                yield pieces
                pieces, room = [], CHUNK
    if pieces:
        yield pieces
