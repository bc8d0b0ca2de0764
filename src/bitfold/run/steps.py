"""The steps of a run, each a function that returns a value: check, open, plan, forecast, execute, record."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from bitfold.calibration.obstacles import why_not_calibrated
from bitfold.calibration.session import runnable
from bitfold.calibration.shape import LONGEST
from bitfold.checkpoints import Source, open_source
from bitfold.checkpoints.object_storage import is_url
from bitfold.checkpoints.schema import QUANT_METHOD
from bitfold.checkpoints.staging import open_output, partial_of
from bitfold.checkpoints.targets import open_target
from bitfold.errors import CheckpointError, UsageError
from bitfold.executors.opening import check_executor
from bitfold.executors.protocol import Executor
from bitfold.forecast.ceiling import MemoryChooser
from bitfold.forecast.preflight import Asked, Preflight, preflight, refuse_impossible
from bitfold.models.opening import open_skeleton
from bitfold.planning.accounting import account_for
from bitfold.planning.auto import choose
from bitfold.planning.plan import make_plan
from bitfold.planning.tables import with_tables
from bitfold.recipes.options import choose_recipe
from bitfold.records.record import with_earlier_errors, write_record
from bitfold.records.run_report import QuantizeReport, TensorReport, peak_memory
from bitfold.run.budget import Budget, budget_rules, check_budget
from bitfold.run.crew import Crew, Share, share_memory
from bitfold.run.devices import check_device
from bitfold.run.export import check_export, export_rules, single_file
from bitfold.run.low_disk import (
    WHY,
    by_file,
    check_low_disk,
    on_demand,
    on_demand_of,
    require_data_free,
    with_little_disk,
)
from bitfold.run.options import Request, RunOptions
from bitfold.run.order import Order, Planned, as_text, as_the_output_has_it, decisive
from bitfold.run.writing import Job, PlannedRun, Writing, Written
from bitfold.system import progress
from bitfold.system.outputs import try_file
from bitfold.text.windows import require_text, text_digest
from bitfold.workspace.events import Events
from bitfold.workspace.folder import Workspace, kept_after_failure, size_of
from bitfold.workspace.journal import recorded


@dataclass(frozen=True)
class Opened:
    """A checkpoint open for reading, and the skeleton that says what each tensor is; None = the class is unknown."""

    source: Source
    model: nn.Module | None


@dataclass(frozen=True)
class Forecast:
    """A run as it will be gone about, what it will need, and memory of each worker; None: there are none."""

    run: PlannedRun
    preflight: Preflight
    share: Share | None = None


def check(request: Request, options: RunOptions) -> None:
    """Raise what can be known before anything is opened: options, places to write to, the login."""
    from bitfold.checkpoints.publishing import check_place

    check_executor(options.executor, options.workers)
    check_device(request, options)
    if options.low_disk:
        check_low_disk(request, options)
    if request.export is not None:
        check_export(request, upload=options.upload_repo is not None)
    elif request.budget_flag is not None:
        check_budget(request, options)
    elif request.imatrix is not None:
        what = "an importance matrix chooses formats for a size"
        raise UsageError(what, where="--imatrix", hint="with --target-bpw, --target-size or --export gguf:auto")
    else:
        rules = choose_recipe(request.wanted)
        if not request.wanted.leaves_the_choice:
            request.calibration_of(rules)
    require_text(request.text.text)
    if options.dry_run:
        return
    read = None if is_url(request.source) else Path(request.source)
    open_output(request.out, read, single=single_file(request))
    if options.events is not None:
        try_file(options.events)
    if options.upload_repo is not None:
        check_place(options.upload_repo, options.token)  # before the work, not after it


@contextmanager
def open_model(request: Request, options: RunOptions) -> Iterator[Opened]:
    """Open the checkpoint, fetched first where it is of the Hub; only headers are read.

    Raises:
        CheckpointError: it cannot be read.
    """
    from bitfold.checkpoints.hub.fetch import resolve

    if options.low_disk:
        with on_demand(request, options) as fetched:
            yield Opened(fetched, _skeleton(fetched))
        return
    local = resolve(request.source, revision=options.revision, token=options.token)
    source = open_source(local, pre_tokenizer=options.pre_tokenizer)
    try:
        yield Opened(source, _skeleton(source))
    finally:
        source.close()


def _skeleton(source: Source) -> nn.Module | None:
    model = open_skeleton(source)
    if model is None:
        warnings.warn(
            f"transformers does not have the class {source.config.get('architectures')}: what a tensor is, is judged"
            " by its name and shape, and bitfold.load will want the module (load(path, module=...))",
            stacklevel=2,
        )
    return model


def plan(opened: Opened, request: Request, options: RunOptions, obstacle: str | None = None) -> PlannedRun:
    """Decide the method where that is left open, and what becomes of every tensor and byte.

    Args:
        opened, request, options: of the run.
        obstacle: what was found to stand in the way of calibration, where the method is left open.

    Raises:
        CheckpointError: all that the rules name is quantized already.
    """
    wanted, why, source = request.wanted, "", opened.source
    obstacle = WHY if options.low_disk else obstacle
    more: tuple[str, ...] = ()
    why_not = partial(why_not_calibrated, source, opened.model)
    if request.export is not None or request.budget_flag is not None:
        _require_original(source)
    if request.export is not None:
        rules, why, more = export_rules(request, source, opened.model, options, why_not)
        calibration = request.calibration_of(rules)
    elif request.budget_flag is not None:
        obstacle = why_not() if obstacle is None and wanted.method != "rtn" else obstacle
        calibrated = obstacle is None and wanted.method != "rtn"
        rules, why = budget_rules(Budget(source, opened.model, request, options, calibrated))
        why = f"{why}; without calibration: {obstacle}" if obstacle else why
        calibration = request.text if any(rule.needs_text for rule in rules.rules) else None
    elif wanted.leaves_the_choice:
        text = request.text
        choice = choose(wanted.bits, lambda: obstacle or why_not(), tokens=text.nsamples * (text.seqlen or LONGEST))
        rules, why = choose_recipe(wanted.with_choice(choice.options)), f"{choice.method}: {choice.why}"
        calibration = text if any(rule.needs_text for rule in rules.rules) else None
    else:
        rules = choose_recipe(wanted)
        calibration = request.calibration_of(rules)
        if calibration is not None:  # a choice has read it
            source.tokenizer()
            runnable(opened.model, source)
    shorten, named = wanted.shortens_groups, rules
    decided = make_plan(source, opened.model, rules, shorten_groups=shorten)
    if wanted.packs_tables and request.export is None:
        rules, decided, more = with_tables(source, opened.model, rules, decided, options.seed)
        shorten = shorten or rules != named
    if not decided.quantized:
        _require_original(source)
    job = Job(request.source, request.out, rules, options.seed, calibration, options.max_shard_bytes, request.kind)
    chosen = request.export is None and request.budget_flag is not None
    decided, said = as_the_output_has_it(decided, job.kind, source)
    more = (*more, *said)
    if options.low_disk:
        require_data_free(decided)
        decided = by_file(decided, on_demand_of(source))
    account = account_for(source, decided)
    return PlannedRun(
        source, opened.model, decided, job, account, why, substitutes=more, chosen=chosen, shorten=shorten
    )


def _require_original(source: Source) -> None:
    if source.quantization is not None:
        hint = "quantize the original; of a folder that is partly packed, a recipe quantizes what is left"
        raise CheckpointError(f"is quantized already ({QUANT_METHOD})", where=str(source.path), hint=hint)


def forecast(run: PlannedRun, options: RunOptions, executor: Executor) -> Forecast:
    """What it will need, and how it keeps under its ceiling: as an interrupted run did that it goes on with.

    Raises:
        ResourceError: it cannot be done in the memory, or on the disk.
    """
    before = {} if options.restart else recorded(partial_of(run.job.out)).get("calibration") or {}
    chooser = MemoryChooser(run.source, run.model, run.plan, run.job.calibration, before.get("columns"))
    use = chooser.choose(options.max_memory)
    run = replace(run, job=replace(run.job, calibration=use.calibration), hessian_bytes=use.hessian_bytes)
    asked = Asked(options.seed, options.max_shard_bytes, options.dry_run, options.max_memory, run.job.kind)
    found = replace(preflight(run.source, run.model, run.plan, use, asked), substitutes=list(run.substitutes))
    if options.low_disk:
        found = with_little_disk(found, on_demand_of(run.source), options.max_shard_bytes)
    if not options.dry_run:
        refuse_impossible(found, run.job.out, options.max_memory, has=size_of(partial_of(run.job.out)))
        for line in (found.summary(), *found.cautions()):
            progress.say(line)
    if executor.here:
        return Forecast(run, found)
    running = 0 if run.job.calibration is None else found.peak_memory
    seen = Planned(run.source, run.model, run.plan)
    return Forecast(run, found, share_memory(seen, executor, options.max_memory, running))


def execute(expected: Forecast, options: RunOptions, executor: Executor) -> QuantizeReport:
    """Do the work, or go on with it; after a failure, what is finished stays for the next time."""
    run = expected.run
    single = open_target(run.job.kind, run.job.out, None, run.source).single
    work = Workspace(run.job.out, _identity(run, options), restart=options.restart, single=single)
    if work.published is not None:  # an earlier run had time for everything but this
        reports = [TensorReport.from_dict(record["report"]) for record in work.journal.of_kind("tensor")]
        work.journal.discard()
        return replace(report_of(expected, options, Written(reports)), output=str(work.published))
    with kept_after_failure(work), Events(options.events) as events:
        facts = report_of(expected, options).to_dict()
        events.write("begin", totals=facts["account"], **{key: facts[key] for key in _FACTS})
        crew = _crew(expected, options, executor, work)
        writing = Writing(run, work, events, options, expected.preflight.times, crew)
        report = report_of(expected, options, writing.tensors())
        report = replace(report, output=str(writing.folder(report)))
        events.write("end", peak_memory=peak_memory(), **report.sums())
    return report


_FACTS = ("source", "output", "recipe", "preflight")


def _crew(expected: Forecast, options: RunOptions, executor: Executor, work: Workspace) -> Crew | None:
    """Other processes that make what needs no data; None: this one does."""
    if expected.share is None:
        return None
    run, job = expected.run, expected.run.job
    decides = decisive(run.source, run.plan, job.rules, job.seed, job.kind)
    where = str(run.source.path.absolute())
    order = Order(where, options.pre_tokenizer, job.rules.dumps(), run.shorten, job.kind, job.seed, as_text(decides))
    return Crew(executor, order, run.source, run.plan, expected.share, work.parts)


def report_of(expected: Forecast, options: RunOptions, written: Written | None = None) -> QuantizeReport:
    """What the run reports: the one place where it is filled in. Without `written`, every tensor as it is planned."""
    run = expected.run
    planned = Written([d.report(d.nbytes()) for d in run.plan.written])
    done = planned if written is None else written
    return QuantizeReport(
        source=run.job.source,
        output=None if options.dry_run else str(run.job.out),
        recipe=run.job.rules.to_dict(),
        tensors=with_earlier_errors(run.source.path, done.tensors),
        files=done.files,
        account=run.account.totals(),
        unread=run.source.unread(),
        ceiling=options.max_memory,
        preflight=expected.preflight.to_dict(),
        method=run.why,
        acts=done.acts,
        fallbacks=done.fallbacks,
    )


def record(report: QuantizeReport, job: Job, options: RunOptions, started: float) -> QuantizeReport:
    """Note in the finished folder how it was made, and push it where that was asked for.

    Args:
        report: of the run.
        job: what was done.
        options: how.
        started: when, by `time.perf_counter()`.
    """
    from bitfold.checkpoints.hub.upload import open_repo
    from bitfold.checkpoints.publishing import publish

    report = replace(report, seconds=time.perf_counter() - started, peak_memory=peak_memory())
    if options.dry_run or not job.out.is_dir():
        return report
    write_record(job.out, report, {"seed": job.seed, "calibration": job.calibration and asdict(job.calibration)})
    if options.upload_repo is None:
        return report
    if options.low_disk:
        return replace(report, url=open_repo(options.upload_repo, options.token))
    return replace(report, url=publish(job.out, options.upload_repo, options.token))


def _identity(run: PlannedRun, options: RunOptions) -> dict[str, Any]:
    """What decides the bytes of the result."""
    job = run.job
    calibration = None if job.calibration is None else asdict(job.calibration)
    if calibration is not None:
        calibration["text"] = text_digest(calibration["text"])
    return {
        **decisive(run.source, run.plan, job.rules, job.seed, job.kind),
        "source": {"name": Path(job.source).name, "files": run.source.fingerprint()},
        "calibration": calibration,
        "shard size": job.max_shard_bytes,
        **({} if options.kept_text is None else {"text": "kept"}),
        **({} if options.device.type == "cpu" else {"device": options.device.type}),
        **({} if options.pre_tokenizer is None else {"pre-tokenizer": options.pre_tokenizer}),
    }
