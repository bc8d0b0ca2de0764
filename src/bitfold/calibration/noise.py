"""What errors of a known size cost a whole model: noise in place of rounding, which costs seconds in place of minutes.

Errors of rounding have no pattern, those of trellis codes on rotated inputs least of all, so that normal noise of the
same size in each row does to a text what they do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from bitfold.calibration.tail import FEW, Tail, tokens_at_once
from bitfold.errors import ModelError
from bitfold.evaluation.scoring import divergence
from bitfold.models.sites import Site
from bitfold.system import progress


@torch.no_grad()
def noisy_divergences(
    model: Any, copy: Any, sites: Mapping[str, Site], errors: list[Mapping[str, float]], ids: torch.Tensor, seed: int
) -> list[float]:
    """KL(model || with noise), mean over all tokens of a text, nats, of each of several sets of errors.

    Args:
        model: the original, whole, float32.
        copy: another one of it, which is left with noise.
        sites: the weights that errors are named for.
        errors: relative square error of each weight, of each set; the noise of a weight is the same in all of them, but
            for its size.
        ids: token ids (windows, tokens).
        seed: of the noise.

    Raises:
        ModelError: logits that cannot be had a few tokens at a time.
    """
    tails = Tail.of(model, ids[:1, :FEW]), Tail.of(copy, ids[:1, :FEW])
    if tails[0] is None or tails[1] is None:
        raise ModelError("its logits cannot be had a few tokens at a time", where=type(model).__name__)
    size, found = tokens_at_once(int(model.get_input_embeddings().weight.shape[0])), []
    with progress.bar("compare plans", len(errors) * len(ids)) as bar:
        for these in errors:
            for name, site in sites.items():
                noisy = copy.get_parameter(name)
                noisy.copy_(model.get_parameter(name))
                _add_noise(site.oriented(noisy), these[name], _generator(name, seed))
            total = 0.0
            for window in ids:
                total += _divergence((tails[0], tails[1]), window[None], size)
                bar.advance(1)
            found.append(total / ids.numel())
    return found


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def _add_noise(w: torch.Tensor, error: float, generator: torch.Generator) -> None:
    """In place, matrix by matrix: of the size of each row."""
    for matrix in w if w.dim() == 3 else (w,):
        size = (error * matrix.square().mean(-1, keepdim=True)).sqrt()
        matrix.add_(torch.randn(matrix.shape, generator=generator).mul_(size))


def _divergence(tails: tuple[Tail, Tail], ids: torch.Tensor, size: int) -> float:
    """Sum over the tokens of a window (1, tokens), the logits of `size` tokens at a time."""
    hidden = [tail.hidden(ids) for tail in tails]
    total = 0.0
    for at in range(0, ids.shape[1], size):
        part = slice(at, at + size)
        logits = (tail.logits(h[:, part], ids[:, part])[0].float() for tail, h in zip(tails, hidden, strict=True))
        p, q = (x.log_softmax(-1) for x in logits)
        total += float(divergence(p, q, "the model with noise").double().sum())
    for tail in tails:
        tail.forget()
    return total
