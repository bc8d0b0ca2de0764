"""Importance matrices: measured on text, kept in a file, used by whatever rounds for GGUF."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from bitfold.calibration.fallback import recoverable, sentence
from bitfold.calibration.importance import Windows, by_blocks, by_gradients
from bitfold.calibration.options import Calibration
from bitfold.calibration.session import runnable
from bitfold.calibration.shape import walk_shape, window
from bitfold.calibration.tensors import Reader, original
from bitfold.checkpoints import Source, open_source
from bitfold.checkpoints.gguf.described import describe_model
from bitfold.checkpoints.gguf.imatrix import Imatrix, Importance, write_imatrix
from bitfold.checkpoints.side_files import tokenizer_folder
from bitfold.checkpoints.staging import open_output
from bitfold.errors import BitfoldError, CheckpointError, ModelError, ResourceError
from bitfold.models.opening import open_skeleton
from bitfold.models.vocabulary import refuse_unknown_tokens
from bitfold.planning.plan import make_plan
from bitfold.recipes.recipe import Recipe
from bitfold.system import memory
from bitfold.system.units import size_text
from bitfold.text.tokenizer import read_tokenizer
from bitfold.text.tokens import SELF, calibration_tokens

_GRADIENTS_UP_TO = 500_000_000  # parameters: gradients need the whole model, in float32
_FEW_WINDOWS, _SHORT = 8, 512  # of text tell what errors of a tensor cost well enough to choose its type


def make_imatrix(
    src: str,
    out: Path,
    calibration: Calibration,
    *,
    seed: int = 0,
    gradients: bool | None = None,
    revision: str | None = None,
    pre_tokenizer: str | None = None,
) -> Imatrix:
    """Measure a model and write the file.

    Args:
        src: a local Hugging Face folder, a GGUF file, or a Hub id.
        out: the file: in the older form of llama.cpp if its name ends in .dat, else GGUF.
        calibration: text, windows, tokens of a window (None = 512, or what the model has positions for).
        seed: of labels.
        gradients: also measure what errors cost; None = if the model is small enough.
        revision, pre_tokenizer: see `RunOptions`.

    Raises:
        BitfoldError: the model cannot be run, or is none that GGUF knows, or the file cannot be written.
    """
    from bitfold.checkpoints.hub.fetch import resolve

    open_output(out, single=True)
    source = open_source(resolve(src, revision=revision), pre_tokenizer=pre_tokenizer)
    try:
        found = measured(source, open_skeleton(source), calibration, seed, gradients=gradients)
    finally:
        source.close()
    write_imatrix(out, found)
    return found


def few(calibration: Calibration) -> Calibration:
    """As much of the text as is needed to choose types."""
    short = None if (calibration.seqlen or _SHORT) >= _SHORT else calibration.seqlen
    return replace(calibration, nsamples=min(_FEW_WINDOWS, calibration.nsamples), seqlen=short)


def named_as(source: Source) -> Callable[[str], str]:
    """By which name an importance matrix knows a tensor: the one of GGUF where it has one for the model."""
    try:
        known = describe_model(source.config, "", str(source.path))
    except CheckpointError:  # a family that GGUF has no place for, whose importance is for bitfold's own folders
        return lambda name: name
    return lambda name: known.gguf_name(name) or name


def measured(
    source: Source,
    skeleton: nn.Module | None,
    calibration: Calibration,
    seed: int,
    *,
    gradients: bool | None,
    windows: Windows | None = None,
) -> Imatrix:
    """What the inputs of the weights of a model are like, by the names that these have in GGUF.

    Args:
        source: open.
        skeleton: of its model.
        calibration: text, windows, tokens of a window.
        seed: of labels.
        gradients: see `make_imatrix`.
        windows: where finished windows of gradients are kept.

    Raises:
        ResourceError: gradients are asked for, and the model is too large for them.
        ModelError: it cannot be run there and back, such as one that makes no logits.
        BitfoldError: as `make_imatrix`.
    """
    name_of, model = named_as(source), runnable(skeleton, source)
    ids = tokens_of(source, model, calibration)
    reader = whole_reader(source, model)
    if _affordable(model) if gradients is None else gradients:
        require_memory(model, source)
        try:
            found = by_gradients(original(source, reader), walk_shape(model), ids, seed, windows)
        except BitfoldError:
            raise
        except Exception as error:  # whatever the model raises
            what = f"what errors cost cannot be measured: {sentence(recoverable(error))}"
            raise ModelError(what, where=type(model).__name__, hint="--bits does without") from error
    else:
        found = by_blocks(model, reader, walk_shape(model), ids)
    named: dict[str, Importance] = {name_of(name): entry for name, entry in found.items()}
    return Imatrix(named, ids.numel(), ids.shape[1], (calibration.text,))


def whole_reader(source: Source, model: nn.Module) -> Reader:
    """Of all tensors of a model as they are."""
    return Reader(source, model, make_plan(source, model, Recipe(()), shorten_groups=False))


def tokens_of(source: Source, model: nn.Module, calibration: Calibration) -> torch.Tensor:
    """int64 (windows, tokens): the text that importance is measured on, in short windows where nothing is said."""
    if calibration.text == SELF:
        raise ModelError("importance is measured on text", where="--calibration", hint="name a file of text")
    seqlen = window(calibration.seqlen, model)
    seqlen = seqlen if calibration.seqlen is not None else min(seqlen, _SHORT)
    with tempfile.TemporaryDirectory(prefix="bitfold-importance-") as scratch:
        folder = tokenizer_folder(source, Path(scratch))
        count, start = calibration.nsamples, calibration.start_token
        ids = calibration_tokens(folder, calibration.text, nsamples=count, seqlen=seqlen, start_token=start)
        refuse_unknown_tokens(model, ids, read_tokenizer(folder))
    return ids


def _numel(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _affordable(model: nn.Module) -> bool:
    return _numel(model) <= _GRADIENTS_UP_TO


def require_memory(model: nn.Module, source: Source, *, copies: int = 1, ceiling: int | None = None) -> None:
    """That there is room for a whole model in float32.

    Args:
        model: its skeleton.
        source: where it is from.
        copies: how many of it.
        ceiling: on the resident memory of the process, bytes; None = a share of what is free.

    Raises:
        ResourceError: there is not.
    """
    needed, limit = 4 * copies * _numel(model), ceiling or memory.default_ceiling()
    if limit is not None and needed + (memory.resident() or 0) > limit:
        what = f"that needs the whole model in memory, in float32, {size_text(needed)}; {size_text(limit)} are there"
        hint = "`bitfold imatrix` on a larger machine makes a file for --imatrix; --bits and gguf:Q4_K_M need none"
        raise ResourceError(what, where=str(source.path), hint=hint)
