"""The driver: a checkpoint in, a quantized folder out, one tensor in memory at a time.

Plan first (names, shapes and rules only), then read, quantize and write tensor by tensor. Everything is written aside,
under a name that no loader looks at, and renamed when it is complete; a run that was cut short is gone on with.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from bitfold.calibration.session import LONGEST, Calibration, settings
from bitfold.checkpoints import Source, open_source
from bitfold.checkpoints.bitfold_folder import QUANT_METHOD
from bitfold.checkpoints.safetensors import digest_of
from bitfold.errors import CheckpointError, UsageError
from bitfold.forecast.ceiling import MemoryChooser, MemoryUse
from bitfold.forecast.preflight import Asked, preflight, refuse_impossible
from bitfold.models.opening import open_skeleton
from bitfold.planning.accounting import account_for
from bitfold.planning.auto import choose
from bitfold.planning.plan import Plan, blank_report, make_plan
from bitfold.recipes.options import choose_recipe, leaves_the_choice
from bitfold.recipes.recipe import Recipe
from bitfold.records.record import write_record
from bitfold.records.run_report import QuantizeReport, TensorReport, peak_memory
from bitfold.run.writing import Job, OnTensor, PlannedRun, Writing
from bitfold.system import progress
from bitfold.system.memory import Ceiling
from bitfold.text.tokens import BUNDLED
from bitfold.workspace.events import Events
from bitfold.workspace.folder import Workspace, partial_of, refuse_existing, size_of, software
from bitfold.workspace.journal import recorded


def quantize(
    src: str | Path,
    out: str | Path,
    *,
    bits: int | None = None,
    format: str | None = None,
    group_size: int | None = None,
    fit: str | None = None,
    method: str | None = None,
    transform: str | None = None,
    act: str | None = None,
    prune: str | None = None,
    ignore: Iterable[str] = (),
    recipe: Recipe | str | Path | None = None,
    calibration: Calibration | str | None = None,
    dry_run: bool = False,
    max_memory: int | None = None,
    restart: bool = False,
    strict: bool = False,
    events: str | Path | None = None,
    seed: int = 0,
    revision: str | None = None,
    token: str | None = None,
    upload_repo: str | None = None,
    max_shard_bytes: int = 4 << 30,
    on_tensor: OnTensor | None = None,
) -> QuantizeReport:
    """Quantize a checkpoint into a new folder, streaming tensor by tensor.

    Args:
        src: a local Hugging Face folder, a GGUF file, or a Hub id.
        out: the folder to make; must not exist, or be empty.
        bits, format, group_size, fit, method, transform, act, prune, ignore, recipe: see `choose_recipe`; "auto" as
            method, or bits alone (but for act and ignore), leaves the choice of the method to bitfold (see auto.py).
        calibration: text for methods that need it (see `Calibration`, or just its `text`); default: the text that comes
            with bitfold.
        dry_run: plan and report only; write nothing.
        max_memory: ceiling on the resident memory of the whole process, bytes: kept, if need be by solving wide layers
            in ranges of their inputs, or refused; None = no more than what is free, with a word of caution beyond four
            fifths of it.
        restart: forget what an earlier run that was cut short has finished, instead of going on with it.
        strict: raise when a tensor is flagged (NaN, rows or columns of zeros, an error far from its format's).
        events: a file to which what happens is appended as JSON lines.
        seed: for methods that draw random numbers.
        revision, token: of the Hub repository.
        upload_repo: push the finished folder there.
        max_shard_bytes: size at which a new shard is begun.
        on_tensor: called with the report of each tensor as it is written.

    Raises:
        BitfoldError: what is wrong, where, and what to do. Nothing that looks whole is left behind; finished work stays
            beside `out`, and the same call goes on with it.
    """
    options: dict[str, Any] = {"format": format, "fit": fit, "transform": transform, "act": act, "prune": prune}
    options |= {"bits": bits, "group_size": group_size, "recipe": recipe}
    empty = Job(str(src), Path(out), Recipe(()), seed, None, max_shard_bytes)
    job, choose = _begin(empty, method, options, tuple(ignore), calibration)
    log = None if events is None else Path(events)
    manner = _Manner(revision, token, upload_repo, restart, strict, log, max_memory, choose)
    return _quantize(job, manner, shorten=bits is not None and group_size is None, dry_run=dry_run, on_tensor=on_tensor)


Chooser = Callable[[Source, nn.Module | None], tuple[Job, str]]


def _begin(
    job: Job,
    method: str | None,
    options: dict[str, Any],
    ignore: tuple[str, ...],
    calibration: Calibration | str | None,
) -> tuple[Job, Chooser | None]:
    """The job with its rules; and, where the method is left open, who chooses it once the checkpoint is known."""
    others = (value for key, value in options.items() if key not in ("bits", "act"))
    auto = leaves_the_choice(options["bits"], method, others)
    rules = choose_recipe(method="rtn" if auto else method, ignore=ignore, **options)
    if auto:
        return replace(job, rules=rules), partial(_chosen, job, {**options, "ignore": ignore}, calibration)
    return replace(job, rules=rules, calibration=_calibration(rules, calibration, method)), None


@dataclass(frozen=True)
class _Manner:
    """How a run is to go about it; no byte of the result depends on this."""

    revision: str | None
    token: str | None
    upload_repo: str | None
    restart: bool
    strict: bool
    events: Path | None
    max_memory: int | None
    choose: Chooser | None = None


def _quantize(job: Job, manner: _Manner, *, shorten: bool, dry_run: bool, on_tensor: OnTensor | None) -> QuantizeReport:
    from bitfold.checkpoints.hub.transfer import check_login, resolve, upload

    started = time.perf_counter()
    upload_repo = None if dry_run else manner.upload_repo
    if not dry_run and not partial_of(job.out).exists():
        refuse_existing(job.out)
    if upload_repo is not None:
        check_login(manner.token)  # before the work, not after it
    source = open_source(resolve(job.source, revision=manner.revision, token=manner.token))
    try:
        model = _open_model(source)
        job, why = (job, "") if manner.choose is None else manner.choose(source, model)
        if job.calibration is not None and manner.choose is None:  # a choice has read it
            source.tokenizer()
        plan = make_plan(source, model, job.rules, shorten_groups=shorten)
        economy = _economy(source, model, plan, job, manner)
        job = replace(job, calibration=economy.calibration)
        run = PlannedRun(source, model, plan, job, account_for(source, plan), economy.hessian_bytes)
        report = blank_report(plan, job.source, None if dry_run else str(job.out), job.rules)
        report.ceiling, report.method = manner.max_memory, why
        asked = Asked(job.seed, job.max_shard_bytes, dry_run, manner.max_memory)
        ahead = preflight(source, model, plan, economy, asked)
        report.preflight = ahead.to_dict()
        report.account, report.unread = run.account.totals(), source.unread()
        if not dry_run:
            refuse_impossible(ahead, job.out, manner.max_memory, has=size_of(partial_of(job.out)))
            for line in (ahead.summary(), *ahead.cautions()):
                progress.say(line)
            _write(run, report, manner, on_tensor)
    finally:
        source.close()
    report.seconds, report.peak_memory = time.perf_counter() - started, peak_memory()
    if not dry_run:
        write_record(job.out, report, {"seed": job.seed, "calibration": job.calibration and asdict(job.calibration)})
    if upload_repo is not None:
        report.url = upload(job.out, upload_repo, token=manner.token)
    return report


def _economy(source: Source, model: nn.Module | None, plan: Plan, job: Job, manner: _Manner) -> MemoryUse:
    """How it goes about its memory: as an interrupted run did that it is to go on with."""
    before = {} if manner.restart else recorded(partial_of(job.out)).get("calibration") or {}
    return MemoryChooser(source, model, plan, job.calibration, before.get("columns")).choose(manner.max_memory)


def _chosen(
    job: Job, options: dict[str, Any], calibration: Calibration | str | None, source: Source, model: nn.Module | None
) -> tuple[Job, str]:
    """The job with the method that fits this checkpoint, and why it is that one."""
    wanted = Calibration(calibration or BUNDLED) if not isinstance(calibration, Calibration) else calibration
    choice = choose(options["bits"], source, model, tokens=wanted.nsamples * (wanted.seqlen or LONGEST))
    asked = {key: value for key, value in options.items() if value is not None}
    rules = choose_recipe(**{**choice.options, **asked, "bits": choice.options.get("bits", options["bits"])})
    needed = any(rule.needs_text for rule in rules.rules)
    return replace(job, rules=rules, calibration=wanted if needed else None), f"{choice.method}: {choice.why}"


def _calibration(rules: Recipe, given: Calibration | str | None, method: str | None) -> Calibration | None:
    """The calibration of a run; None when no rule needs one."""
    if not any(rule.needs_text for rule in rules.rules):
        if given is not None and (isinstance(given, str) or given.text != BUNDLED):
            raise UsageError("no rule uses the calibration text", hint="--method gptq does, and others")
        return None
    return given if isinstance(given, Calibration) else settings(method, given or BUNDLED)


def _open_model(source: Source) -> nn.Module | None:
    """The skeleton that says what each tensor is; a checkpoint that is quantized already is refused."""
    method = (source.config.get("quantization_config") or {}).get("quant_method")
    if method is not None or hasattr(source, "quantization"):
        raise CheckpointError(
            f"is quantized already ({method or QUANT_METHOD})",
            where=str(source.path),
            hint="quantize the original; quantizing twice loses twice",
        )
    model = open_skeleton(source)
    if model is None:
        warnings.warn(
            f"transformers does not have the class {source.config.get('architectures')}: what a tensor is, is judged"
            " by its name and shape, and bitfold.load will want the module (load(path, module=...))",
            stacklevel=2,
        )
    return model


def _write(run: PlannedRun, report: QuantizeReport, manner: _Manner, on_tensor: OnTensor | None) -> None:
    """Do the work, or go on with it; after a failure, what is finished stays for the next time."""
    work = Workspace(run.job.out, _identity(run), restart=manner.restart)
    if work.published:  # an earlier run had time for everything but this
        report.tensors = [TensorReport.from_dict(record["report"]) for record in work.journal.of_kind("tensor")]
        work.journal.discard()
        return
    try:
        with Events(manner.events) as events:
            facts: dict[str, Any] = {"source": report.source, "output": report.output, "recipe": report.recipe}
            facts["preflight"] = report.preflight
            events.write("begin", totals=report.account, **facts)
            writing = Writing(run, work, events, on_tensor)
            writing.ceiling = Ceiling(manner.max_memory)
            writing.tensors()
            writing.folder(report, strict=manner.strict)
            events.write("end", peak_memory=peak_memory(), **report.sums())
    except BaseException:
        if work.leave():
            warnings.warn(
                f"what is finished is kept in {work.folder}: the same command goes on with it, --restart begins anew",
                stacklevel=2,
            )
        raise


def _identity(run: PlannedRun) -> dict[str, Any]:
    """What decides the bytes of the result."""
    job = run.job
    calibration = None if job.calibration is None else asdict(job.calibration)
    if calibration is not None and Path(calibration["text"]).is_file():
        calibration["text"] = digest_of(Path(calibration["text"]))
    return {
        "source": {"name": Path(job.source).name, "files": run.source.fingerprint()},
        "recipe": job.rules.to_dict(),
        "seed": job.seed,
        "calibration": calibration,
        "shard size": job.max_shard_bytes,
        "formats": {name: entry.to_dict() for name, entry in run.plan.entries(job.seed).items()},
        "version": software(),
    }
