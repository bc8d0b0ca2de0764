"""What a model is calibrated on: windows of token ids, and how much each token counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from bitfold.calibration.fallback import Fallback, recoverable
from bitfold.calibration.fisher import one_sided, token_weights
from bitfold.calibration.options import Calibration
from bitfold.calibration.resume import IDS, Bookmarks
from bitfold.calibration.shape import walk_shape
from bitfold.calibration.walk import Text
from bitfold.checkpoints.shards import save_tensors, sync_file, written_error
from bitfold.errors import ModelError
from bitfold.models.vocabulary import refuse_unknown_tokens
from bitfold.system.backend import fast_dtype
from bitfold.text.start import text_start
from bitfold.text.tokenizer import read_tokenizer
from bitfold.text.tokens import SELF, calibration_tokens, own_text


@dataclass(frozen=True)
class Wish:
    """Which text.

    Args:
        calibration: of the run.
        seqlen: tokens of a window.
        seed: of text that the model writes, and of labels.
        weighed: layers whose tokens are weighed; empty = none.
        kept: a file that has the text and the weights for other runs, too; made where it is not there yet; None = none.
    """

    calibration: Calibration
    seqlen: int
    seed: int
    weighed: tuple[str, ...]
    kept: Path | None = None


def prepare(
    wish: Wish,
    model: nn.Module,
    read: Callable[[torch.dtype], nn.Module],
    tokenizer: Path,
    bookmarks: Bookmarks | None,
    share: Callable[[Bookmarks, int], None] | None = None,
) -> tuple[Text, Fallback | None]:
    """The text, from an earlier process where it left some; and why tokens are not weighed, if they should have been.

    Args:
        wish: which text.
        model: the skeleton.
        read: brings the original model into memory in a dtype, where it is needed for its own text or for gradients.
        tokenizer: folder of the tokenizer.
        bookmarks: of the run.
        share: has others weigh the windows, so many, and keeps what they found with the bookmarks; None: nobody else.

    Raises:
        ModelError: the text has tokens that the model does not have.
    """
    if bookmarks is not None and (found := bookmarks.inputs()) is not None:
        return Text(*found), None
    if wish.kept is not None and wish.kept.is_file():
        return _from_file(wish.kept, bookmarks)
    ids = None if bookmarks is None else bookmarks.ids()
    if ids is None:
        ids = _ids(wish, model, read, tokenizer)
        if bookmarks is not None:
            bookmarks.keep_ids(ids)
    weights, failed = dict[str, torch.Tensor](), None
    if wish.weighed:
        blocks = [block.path for block in walk_shape(model).blocks]
        try:
            if share is not None and bookmarks is not None:
                share(bookmarks, len(ids))
            whole = read(fast_dtype())
            weights = token_weights(whole, wish.weighed, ids, seed=wish.seed, blocks=blocks, marks=bookmarks)
            if wish.kept is not None:
                _keep({IDS: ids, **weights}, wish.kept)
            weights, failed = _even(weights)
        except Exception as error:  # whatever differentiating a model's own code comes up with
            failed = Fallback("token weights", "all tokens count alike", recoverable(error))
    if bookmarks is not None:
        bookmarks.keep_inputs(ids, weights)
    return Text(ids, weights), failed


def _keep(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Under its name when it is whole."""
    aside = file.with_name(f"{file.name}.tmp")
    save_tensors(tensors, aside)
    try:
        sync_file(aside)
        aside.replace(file)
    except OSError as error:
        raise written_error(error, file, "cannot be written") from error


def _from_file(file: Path, bookmarks: Bookmarks | None) -> tuple[Text, Fallback | None]:
    """The text and its weights as an earlier run has left them."""
    weights = load_file(file)
    ids = weights.pop(IDS)
    weights, failed = _even(weights)
    if bookmarks is not None:
        bookmarks.keep_inputs(ids, weights)
    return Text(ids, weights), failed


def _even(weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Fallback | None]:
    """The weights without those of layers for which nearly no token counts, and a word about these."""
    left = {name: w for name, w in weights.items() if not one_sided(w)}
    without = [name for name in weights if name not in left]
    if not without:
        return weights, None
    what = f"the model is so certain of the text that nearly no token has a gradient in {len(without)} layers"
    return left, Fallback("token weights", f"all tokens count alike there, such as in {without[0]}", ModelError(what))


def _ids(wish: Wish, model: nn.Module, read: Callable[[torch.dtype], nn.Module], tokenizer: Path) -> torch.Tensor:
    """Token ids."""
    asked, known = wish.calibration, read_tokenizer(tokenizer)
    sizes = {"nsamples": asked.nsamples, "seqlen": wish.seqlen}
    start = text_start(known, asked.start_token)
    if asked.text != SELF:
        ids = calibration_tokens(
            tokenizer, asked.text, nsamples=asked.nsamples, seqlen=wish.seqlen, start_token=asked.start_token
        )
        refuse_unknown_tokens(model, ids, known)
        return ids
    refuse_unknown_tokens(model, torch.tensor(start, dtype=torch.int64), known)  # before the whole model is read
    return own_text(read(torch.float32), **sizes, seed=wish.seed, start=start)
