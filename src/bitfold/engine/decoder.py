"""The native decoder of a loaded model: tokens in, logits out, a cache that is allocated once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bitfold.engine.plan import Unsupported, make_plan
from bitfold.errors import UsageError
from bitfold.system import native

__all__ = ["Decoder", "Unsupported"]

CHUNK = 256  # tokens of a prompt in one call: between calls Ctrl-C is heard


class Decoder:
    """A causal language model at work in the native core.

    Weights stay as they are in the model, which must not be changed or moved meanwhile. Keys and values are kept in
    bfloat16; all else is computed in float32, or with activations rounded to 8 bits where the weights ask for it.

    Args:
        model: of a family in `FAMILIES`, with weights on the CPU.
        positions: the longest text, in tokens.
        threads: None: as many as PyTorch has been given.

    Raises:
        Unsupported: the engine has no code for this model, and why.
    """

    def __init__(self, model: nn.Module, positions: int, threads: int | None = None) -> None:
        self._plan = make_plan(model, positions)
        core = native.core()
        assert core is not None
        self._native = core.Decoder(self._plan.plan, threads or native.threads())
        self.ids: list[int] = []

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
        """Memory of keys and values."""
        return int(self._native.cache_bytes)

    def keep(self, ids: Sequence[int]) -> int:
        """Forget what does not begin as `ids` does; how many tokens are left.

        At least the last token of `ids` is forgotten, for its logits are wanted.
        """
        common = 0
        for old, new in zip(self.ids, ids[:-1], strict=False):
            if old != new:
                break
            common += 1
        del self.ids[common:]
        return common

    def extend(self, ids: Sequence[int]) -> Tensor:
        """Read tokens behind those that are there; float32 logits (vocabulary) of what follows the last of them.

        Raises:
            UsageError: no tokens, or more than there is room for.
        """
        out = torch.empty(self.vocabulary)
        self._check(ids)
        for at in range(0, len(ids), CHUNK):
            some = list(ids[at : at + CHUNK])
            last = at + CHUNK >= len(ids)
            self._native.run(some, len(self.ids), out.data_ptr() if last else 0, False)
            self.ids += some
        return out

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Read tokens; float32 logits (tokens, vocabulary) behind each of them. UsageError as `extend`."""
        out = torch.empty(len(ids), self.vocabulary)
        self._check(ids)
        self._native.run(list(ids), len(self.ids), out.data_ptr(), True)
        self.ids += ids
        return out

    def _check(self, ids: Sequence[int]) -> None:
        if not ids:
            raise UsageError("there are no tokens to read")
        if len(self.ids) + len(ids) > self.positions:
            raise UsageError(
                f"{len(self.ids) + len(ids)} tokens are more than the cache has room for, {self.positions}"
            )
