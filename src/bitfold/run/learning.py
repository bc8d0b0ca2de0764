"""Quantize, then distill: runs that end in one folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bitfold.calibration.options import Calibration
from bitfold.checkpoints import open_source
from bitfold.checkpoints.staging import open_output
from bitfold.errors import UsageError
from bitfold.models.model_ref import ModelRef
from bitfold.records.run_report import QuantizeReport
from bitfold.run.driver import run
from bitfold.run.options import Request, RunOptions
from bitfold.run.stages import BETWEEN, Staged
from bitfold.system import progress
from bitfold.text.tokens import BUNDLED, SELF
from bitfold.training.distill import Distilled, distill
from bitfold.training.options import Distillation


def quantize_and_distill(
    request: Request, options: RunOptions, minutes: float, stages: int = 1
) -> tuple[QuantizeReport | None, Distilled | None]:
    """Both; what is between them lies beside the output, hidden, until the output is there.

    Args:
        request: a run that ends in a folder.
        options: how.
        minutes: of distillation, on the calibration text.
        stages: parts of the blocks that are quantized one after the other; between them, for half of the time, what is
            still in floating point learns to make up for what is packed. See `stages`.

    Returns:
        The reports of both; None for the first where an earlier call has done it, for the second where nothing is
        written (a dry run).

    Raises:
        UsageError: not a folder; more stages than blocks, or less than one.
        BitfoldError: see `run` and `distill`; the same call goes on with what is finished.
    """
    from bitfold.checkpoints.hub.fetch import resolve
    from bitfold.checkpoints.publishing import check_place, publish

    if request.export is not None:
        raise UsageError("only bitfold's own folders are distilled", where="--distill", hint="drop --export")
    if options.low_disk:
        raise UsageError("distillation needs the whole model on the disk", where="--distill", hint="drop --low-disk")
    if options.device.type != "cpu":
        raise UsageError("distillation runs on the CPU only", where="--distill", hint="drop --device")
    if options.dry_run:
        return run(request, options), None
    local = resolve(request.source, revision=options.revision, token=options.token)
    ModelRef.of(local).require_causal("a causal language model can be distilled")
    out = open_output(request.out, local)
    if options.upload_repo is not None:
        check_place(options.upload_repo, options.token)
    between, report = _between(request, options, local, out, stages), None
    text = _text(request.calibration)
    learning = Staged(local, between, text, 0.0 if stages == 1 else BETWEEN * minutes)
    how = Distillation(text, minutes - learning.minutes, seed=options.seed)
    if (between / "config.json").is_file():
        progress.say("quantized already; going on with the distillation")
    else:
        request, how_here = replace(request, source=str(local)), replace(options, upload_repo=None)
        if stages != 1:
            how_here = replace(how_here, kept_text=learning.text_file)
            request = learning.up_to_the_last(request, how_here, stages)
        report = run(replace(request, out=between), how_here)
        learning.clean()
    again: dict[str, Any] = {"restart": options.restart, "lessons": None if stages == 1 else learning.lessons}
    found = distill(between, local, out, how, max_memory=options.max_memory, **again)
    for folder in (between, learning.lessons):
        shutil.rmtree(folder, ignore_errors=True)
    if options.upload_repo is not None:
        publish(out, options.upload_repo, options.token)
    return report, found


def _text(calibration: Calibration | str | None) -> str:
    """What is calibrated on, is learned from; what the model writes itself is not."""
    text = calibration.text if isinstance(calibration, Calibration) else calibration
    return BUNDLED if text in (None, SELF) else str(text)


def _between(request: Request, options: RunOptions, local: Path, out: Path, stages: int) -> Path:
    """Named by all that decides its bytes, so that it is not taken for the work of another command."""
    source = open_source(local, pre_tokenizer=options.pre_tokenizer)
    try:
        facts = [source.fingerprint(), options.seed, options.max_shard_bytes, request.target_bytes, request.target_bpw]
        facts.append(stages)
    finally:
        source.close()
    given = request.calibration
    text = asdict(given) if isinstance(given, Calibration) else given
    words = json.dumps([facts, text, repr(request.wanted)], sort_keys=True, default=str)
    return out.with_name(f".{out.name}.quantized-{hashlib.sha256(words.encode()).hexdigest()[:12]}")
