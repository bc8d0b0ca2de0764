"""How far a student's predictions are from its teacher's, and the gradient of that by the student's logits."""

from __future__ import annotations

import torch

from bitfold.errors import UsageError
from bitfold.evaluation.predictions import TopRows

_LEAST = 1e-12  # of a probability


def divergence_and_gradient(logits: torch.Tensor, teacher: TopRows) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(teacher || student) of each row, nats, and its gradient by the logits.

    Of the teacher the likeliest words are known, and the probability of all others together: those count as one word,
    so that the divergence is at most what it would be over the whole vocabulary.

    Args:
        logits: float32 (rows, vocabulary) of the student; becomes the gradient, in place.
        teacher: as many rows.
    """
    words, known = teacher.words.long(), teacher.log_probabilities
    chosen = logits.gather(1, words)
    top = logits.amax(1, keepdim=True)
    q = logits.sub_(top).exp_()
    total = q.sum(1, keepdim=True)
    log_q = chosen - top - total.log()
    p = known.exp()
    rest = (1 - p.sum(1, keepdim=True)).clamp_min(0)
    left = (1 - log_q.exp().sum(1, keepdim=True)).clamp_min(_LEAST)
    kl = (p * (known - log_q)).sum(1) + torch.xlogy(rest, rest / left)[:, 0]
    q.mul_((1 - rest / left) / total)
    return kl, q.scatter_(1, words, log_q.exp() - p)


def surprise_and_gradient(logits: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-probability of the words that came, nats, and its gradient by the logits.

    Args:
        logits: float32 (rows, vocabulary); becomes the gradient, in place.
        words: int64 (rows,).
    """
    came = words[:, None]
    top = logits.amax(1, keepdim=True)
    chosen = logits.gather(1, came) - top
    q = logits.sub_(top).exp_()
    total = q.sum(1, keepdim=True)
    q.div_(total)
    return (total.log() - chosen)[:, 0], q.scatter_add_(1, came, torch.full_like(chosen, -1.0))


def kl_loss(
    logits: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """Mean KL(teacher || student) of a token, nats; differentiable by the student's logits.

    Args:
        logits: float (..., vocabulary) of the student.
        teacher: the same of the teacher, of which no gradient is taken.
        mask: (...), 0 where a token does not count; None = all count.
        temperature: by which both are divided; the loss is multiplied by its square (Hinton et al. 2015,
            arXiv 1503.02531).

    Raises:
        UsageError: of different shapes.
    """
    if logits.shape != teacher.shape:
        what = f"the student predicts {tuple(logits.shape)}, the teacher {tuple(teacher.shape)}"
        raise UsageError(what, hint="both read the same tokens, and know the same words")
    mine, theirs = (torch.log_softmax(x.flatten(0, -2).float() / temperature, -1) for x in (logits, teacher.detach()))
    kl = (theirs.exp() * (theirs - mine)).sum(-1)
    if mask is None:
        return temperature**2 * kl.mean()
    counted = mask.flatten().to(kl.dtype)
    return temperature**2 * (kl * counted).sum() / counted.sum().clamp_min(1)
