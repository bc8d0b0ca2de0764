"""Quantize, then finetune: a base and an adapter, side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bitfold.errors import UsageError
from bitfold.models.model_ref import ModelRef, is_bitfold
from bitfold.recipes.options import MethodOptions
from bitfold.run.driver import run
from bitfold.run.options import Request, RunOptions
from bitfold.system import progress
from bitfold.system.team import Team
from bitfold.training.adapters import require_peft
from bitfold.training.finetune import Finetuned, finetune
from bitfold.training.options import Finetuning


def finetune_model(
    model: str,
    out: Path,
    how: Finetuning,
    base_format: str | None,
    start: str | None,
    options: RunOptions,
    team: Team | None = None,
) -> Finetuned:
    """Train adapters on a quantized folder, or on a model that is quantized first.

    Args:
        model: a folder of ours; or, with `base_format`, a float folder, a GGUF file or a Hub repository.
        out: the adapter's folder. The base that is made lies beside it, as OUT-base, and stays there.
        how: see `Finetuning`.
        base_format: of the base that is made first; None = the model is one already.
        start: see `finetune`.
        options: max_memory, restart, seed, revision and token count.
        team: see `finetune`; a base is quantized by one process.

    Raises:
        UsageError: a float model without a format, or a quantized one with one; several processes and a format.
        BitfoldError: see `run` and `finetune`; the same call goes on with what is finished.
    """
    from bitfold.checkpoints.hub.fetch import resolve

    require_peft()
    local = resolve(model, revision=options.revision, token=options.token)
    ref = ModelRef.of(local)
    quantized = is_bitfold(ref.config)
    ref.close()
    if quantized and base_format is not None:
        raise UsageError("is quantized already", where=model, hint="drop --base-format")
    if not quantized and base_format is None:
        hint = "--base-format nf4-dq quantizes it first, or bitfold quantize"
        raise UsageError("is not a folder that bitfold quantized", where=model, hint=hint)
    if base_format is not None and team is not None and team.size > 1:
        hint = "bitfold quantize first, then torchrun"
        raise UsageError("quantizes in one process", where="--base-format", hint=hint)
    if base_format is not None:
        ref.require_causal("a causal language model can be finetuned")
        base = out.with_name(f"{out.name}-base")
        if (base / "config.json").is_file():
            progress.say(f"{base} is there already; going on with it")
        else:
            run(Request(str(local), base, MethodOptions(format=base_format)), replace(options, upload_repo=None))
        local = base
    return finetune(local, out, how, start=start, max_memory=options.max_memory, restart=options.restart, team=team)
