"""Token weights: how much the loss cares about the output of a layer at each token.

The gradient of the cross entropy, with labels drawn from the model's own predictions, gives the diagonal of the Fisher
information; its square, averaged over the outputs of a layer, weights the tokens in that layer's Hessian (GuidedQuant,
Kim et al. 2025, with one group of rows). One label a token is a noisy look at it, and a few heavy tokens make a noisy
Hessian: the weights here are the square roots of those, which loses less (docs/log.md). One forward and one backward
pass over the calibration text; a block's activations exist only while the backward pass is in it (they are computed
again), and the logits of a few tokens at a time, so that memory holds those of one block and of a few tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from bitfold.calibration.rehearsal import text_inputs
from bitfold.calibration.tail import FEW, Tail, recomputed, tokens_at_once
from bitfold.errors import ModelError
from bitfold.system import progress

_POWER = 0.5  # of the squared gradients
_LARGEST = 50.0  # times the mean: a single token must not be the whole Hessian
_EVEN = 0.02  # of the tokens must carry the weight, as many as carry it when all that do count alike
_WHOLE = 1 << 29  # bytes of the logits of a window that may exist at once, where they cannot be had piece by piece


class Marks(Protocol):
    """Where finished windows are kept, for a process that goes on."""

    def window(self, number: int) -> tuple[dict[str, torch.Tensor], torch.Tensor] | None:
        """What was kept of a window: squares by layer (tokens,), and the state of the generator after it."""

    def keep_window(self, number: int, squares: dict[str, torch.Tensor], state: torch.Tensor) -> None:
        """Keep them."""


def token_weights(
    model: nn.Module,
    names: Iterable[str],
    ids: torch.Tensor,
    *,
    seed: int = 0,
    blocks: Sequence[str] = (),
    marks: Marks | None = None,
) -> dict[str, torch.Tensor]:
    """Weights (samples, seqlen), float32 with mean 1, for each named layer.

    Args:
        model: a language model, whole; in bfloat16 it takes half the time, and labels hide the difference.
        names: paths of its layers.
        ids: token ids (samples, seqlen).
        seed: of the labels.
        blocks: paths of modules whose activations are not kept for the backward pass but computed again.
        marks: where finished windows are kept.

    Raises:
        ModelError: no gradient reaches the layers, or it takes more memory than there should be need for.
        Exception: whatever the model raises when it is differentiated.
    """
    generator = torch.Generator().manual_seed(seed)
    # Made before the work: small results between the large temporaries of a pass would pin the memory of every window.
    found = {name: torch.zeros(ids.shape) for name in names}
    heard: set[str] = set()
    at = 0

    def note(name: str, gradient: torch.Tensor) -> None:
        squares = gradient.float().square().mean(-1).reshape(-1)
        if len(squares) == ids.shape[1]:  # not of streams, prefixes or summaries of tokens: those all count alike
            now.add(name)
            found[name][at] = squares

    now: set[str] = set()
    with _listening(model, found, note), recomputed(model, blocks), progress.bar("weigh tokens", len(ids)) as bar:
        tail = Tail.of(model, ids[:1, :FEW])
        for number, sample in enumerate(ids):
            at, known = number, None if marks is None else marks.window(number)
            if known is not None:
                squares, state = known
                for name, row in squares.items():
                    found[name][at] = row
                generator.set_state(state)
                heard |= squares.keys()
            else:
                now.clear()
                there_and_back(model, tail, sample[None], generator)
                heard |= now
                if marks is not None:
                    marks.keep_window(number, {name: found[name][at] for name in sorted(now)}, generator.get_state())
                if not heard:
                    raise ModelError("no gradient reaches its layers", where=type(model).__name__)
            bar.advance(1)
    return {name: _normalised(found[name]) for name in found if name in heard}


class Some:
    """Marks of a process that weighs some windows only: those before are taken as known, and their labels as drawn.

    Args:
        first: window to be weighed.
        seqlen: tokens of a window; each draws one random number, see `drawn`.
        seed: of the labels.
    """

    def __init__(self, first: int, seqlen: int, seed: int) -> None:
        self._first, self._seqlen = first, seqlen
        self._generator = torch.Generator().manual_seed(seed)
        self.found: dict[int, tuple[dict[str, torch.Tensor], torch.Tensor]] = {}

    def window(self, number: int) -> tuple[dict[str, torch.Tensor], torch.Tensor] | None:
        """See `Marks`."""
        if number >= self._first:
            return None
        torch.rand(self._seqlen, 1, generator=self._generator)
        return {}, self._generator.get_state()

    def keep_window(self, number: int, squares: dict[str, torch.Tensor], state: torch.Tensor) -> None:
        """See `Marks`."""
        self.found[number] = {name: row.clone() for name, row in squares.items()}, state


@contextlib.contextmanager
def _listening(model: Any, names: Iterable[str], note: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Gradients of the outputs of layers are noted; they begin where token ids have become numbers."""

    def listen(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            # A hook of the tensor, not a backward hook of the module: that one would keep the output alive.
            if output.requires_grad:
                output.register_hook(partial(note, name))

        return hook

    def begin(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        # A copy: some models scale it in place, which a leaf does not allow.
        return output.detach().requires_grad_(torch.is_grad_enabled()).clone()

    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]

    handles = [model.get_submodule(name).register_forward_hook(listen(name)) for name in names]
    handles += [module.register_forward_hook(begin) for module in embeddings]
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def there_and_back(model: Any, tail: Tail | None, ids: torch.Tensor, generator: torch.Generator) -> None:
    """One window (1, tokens) through the model, and the gradient of its surprise at labels of its own back."""
    words = int(model.get_input_embeddings().weight.shape[0])
    if tail is None:
        if 4 * ids.numel() * words > _WHOLE:
            raise ModelError("the logits of a window at once take too much memory", where=type(model).__name__)
        whole: Any = model(**text_inputs(model, ids)).logits[0]
        whole.backward(_surprise(whole.detach(), generator))
        return
    # The logits of a window can be larger than the model; a few tokens at a time they stay in the cache.
    hidden: Any = tail.hidden(ids)
    parts, size = list[torch.Tensor](), tokens_at_once(words)
    for piece, tokens in zip(torch.split(hidden.detach(), size, 1), torch.split(ids, size, 1), strict=True):
        # Strides of a slice would stay, and make the head copy its weights into another order for each product.
        part = piece.clone(memory_format=torch.contiguous_format).requires_grad_(True)
        logits: Any = tail.logits(part, tokens)[0]
        logits.backward(_surprise(logits.detach(), generator))
        assert part.grad is not None
        parts.append(part.grad)
    tail.forget()
    hidden.backward(torch.cat(parts, 1))


def _surprise(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gradient of the summed cross entropy by the logits (tokens, vocabulary), labels drawn from them: p - label."""
    p = logits.float().softmax(-1)
    labels = drawn(p, generator)
    return p.scatter_add_(1, labels, torch.full_like(labels, -1.0, dtype=p.dtype)).to(logits.dtype)


def drawn(p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """int64 (rows, 1): an entry of each row of p (rows, words), nonnegative, by its share of the row.

    One random number a row and a running sum: `torch.multinomial` draws one for every entry, which takes longer than
    the rest of the pass where there are 262144 of them.
    """
    sums = p.cumsum(-1)
    below = sums[:, -1:] * torch.rand(len(p), 1, generator=generator)
    return torch.searchsorted(sums, below, right=True).clamp_(max=p.shape[-1] - 1)


def one_sided(weights: torch.Tensor) -> bool:
    """Whether nearly all that is known of a layer would come from a few tokens, or nothing would.

    The gradients of a model that is certain of every token are zeros but for a few, or overflow: the Hessian is then
    that of a few tokens, and whatever the others need is rounded away.

    Args:
        weights: (samples, seqlen) of `token_weights`.
    """
    wide = weights.double()
    even = wide.sum().square() / wide.square().sum()  # tokens that count, if each that does counts alike; NaN if none
    return not bool(even >= _EVEN * weights.numel())


def _normalised(weights: torch.Tensor) -> torch.Tensor:
    weights = weights.pow(_POWER)
    weights = weights / weights.mean().clamp_min(1e-30)
    return weights.clamp(max=_LARGEST)
