"""One run from its plan to its folder: every tensor quantized or kept, written, noted in the journal, told of.

What an earlier run of the same identity has finished is checked by its hashes and not done again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from bitfold.calibration.fallback import Fallback
from bitfold.calibration.options import Calibration
from bitfold.calibration.probe import ActivationCost
from bitfold.calibration.resume import Bookmarks
from bitfold.calibration.runner import HESSIANS
from bitfold.calibration.session import Outcome, Session, solve_blocks
from bitfold.calibration.shared_input import Folded, Solved
from bitfold.checkpoints import Source
from bitfold.checkpoints.manifest import write_manifest
from bitfold.checkpoints.schema import describe
from bitfold.checkpoints.shards import written_error
from bitfold.checkpoints.side_files import tokenizer_folder
from bitfold.checkpoints.targets import FOLDER, open_target
from bitfold.errors import AccountingError
from bitfold.methods.anomalies import weight_flags
from bitfold.models import skeleton
from bitfold.planning.accounting import Account, check_written
from bitfold.planning.decisions import Decision
from bitfold.planning.plan import Plan
from bitfold.recipes.recipe import Recipe
from bitfold.records.card import write_card
from bitfold.records.run_report import QuantizeReport, TensorReport, relative_error
from bitfold.run.crew import Crew
from bitfold.run.items import Made, flags_of_error, left_of, make_item, stored_value
from bitfold.run.low_disk import Sender
from bitfold.run.options import RunOptions
from bitfold.system import progress
from bitfold.system.memory import Ceiling
from bitfold.workspace.events import Events
from bitfold.workspace.folder import Workspace

_RECIPE = "bitfold_recipe.toml"


@dataclass(frozen=True)
class Job:
    """What is to be done."""

    source: str
    out: Path
    rules: Recipe
    seed: int
    calibration: Calibration | None
    max_shard_bytes: int | None
    kind: str = FOLDER


@dataclass(frozen=True)
class PlannedRun:
    """A job with its source open, and what becomes of every tensor.

    Args:
        source, model, plan, job, account: of the run.
        why: this method, where bitfold chose it.
        hessian_bytes: bytes of the Hessians of experts in memory at a time.
        substitutes: what gets another format than was asked for, in words.
        chosen: the rules were chosen for a size; they go into the folder, as --recipe takes them.
        shorten: whether rows shorter than a group got one scale a row.
    """

    source: Source
    model: nn.Module | None
    plan: Plan
    job: Job
    account: Account
    why: str = ""
    hessian_bytes: int = HESSIANS
    substitutes: tuple[str, ...] = ()
    chosen: bool = False
    shorten: bool = False


@dataclass(frozen=True)
class Written:
    """What was written: tensors in the order of the plan, files, what was measured of activations, what failed."""

    tensors: list[TensorReport]
    files: list[str] = field(default_factory=list)
    acts: dict[str, Any] | None = None
    fallbacks: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class WrittenTensors:
    """What is written so far: reports by tensor, hashes by stored name."""

    reports: dict[str, TensorReport] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)


class Writing:
    """The writing of one run.

    Args:
        run: what is to be done.
        work: where.
        events: who is told, as JSON lines.
        options: how.
        times: seconds that each tensor will take, by the forecast; empty = nobody knows.
        crew: other processes that make what needs no data; None: this one does.
    """

    def __init__(
        self,
        run: PlannedRun,
        work: Workspace,
        events: Events,
        options: RunOptions,
        times: Mapping[str, float],
        crew: Crew | None = None,
    ) -> None:
        self.run, self.work, self._events, self._options, self._times = run, work, events, options, times
        self._crew = crew
        self._target = open_target(run.job.kind, work.result, run.job.max_shard_bytes, run.source)
        self._target.layout(run.plan.contents())
        self._sender: Sender | None = None
        if options.low_disk and options.upload_repo is not None:
            self._sender = Sender(options.upload_repo, options.token, self._target, work.result, work.journal)
        self.done = WrittenTensors()
        self._ceiling = Ceiling(options.max_memory)
        self.acts: ActivationCost | None = None
        self.fallbacks: list[dict[str, Any]] = []

    def tensors(self) -> Written:
        """Write every tensor: first what needs calibration, block by block, then the rest in the source's order."""
        self._recall()
        # In seconds, as far as they are known beforehand: a calibrated layer takes far longer than one that is kept.
        units = {
            d.tensor: self._times.get(d.tensor, 0.0) if self._times else d.info.numel for d in self.run.plan.written
        }
        total = sum(units.values())
        with progress.bar("quantize", total, total if self._times else None) as bar:
            bar.skip(sum(units[name] for name in self.done.reports))
            for report in self._remaining():
                bar.advance(units[report.tensor], report.tensor)
                self._ceiling.check()
                if self._options.on_tensor is not None:
                    self._options.on_tensor(report)
        reports = [self.done.reports[d.tensor] for d in self.run.plan.written if d.tensor in self.done.reports]
        acts = None if self.acts is None else {"choice": self.acts.choice, **asdict(self.acts)}
        return Written(reports, self._target.files, acts, self.fallbacks)

    def _recall(self) -> None:
        """Take over what an earlier run wrote, as far as the hashes agree."""
        records = {record["tensor"]: record for record in self.work.journal.of_kind("tensor")}
        for name, record in records.items():
            if all(self._stands(stored, sha) for stored, sha in record["hashes"].items()):
                self.done.hashes |= record["hashes"]
                self.done.reports[name] = TensorReport.from_dict(record["report"])
        if self._sender is not None:
            self._sender.wrote(list(self.done.hashes))  # of a file that was full and not sent
        if records:
            self._events.write("resume", tensors=len(self.done.reports), of=len(self.run.plan.decisions))
            progress.say(f"going on: {len(self.done.reports)} of {len(self.run.plan.decisions)} tensors are done")

    def _stands(self, stored: str, sha: str) -> bool:
        return (self._sender is not None and self._sender.holds(stored)) or self._target.digest(stored) == sha

    def _remaining(self) -> Iterator[TensorReport]:
        if self.run.job.calibration is not None:
            for solved in self._calibrated(self.run.job.calibration):
                if isinstance(solved, ActivationCost):
                    self._measured(solved)
                elif isinstance(solved, Fallback):
                    self._fell_back(solved)
                elif isinstance(solved, Folded):
                    yield self._finish(Made(solved.decision, [solved.value]))
                else:
                    yield self._write_solved(solved)
                del solved  # it holds the weight as it was
        for made in self._data_free():
            yield self._finish(made)
            del made  # it holds the weight as it is stored

    def _calibrated(self, calibration: Calibration) -> Iterator[Outcome]:
        run = self.run
        tokenizer = tokenizer_folder(run.source, self.work.state / "tokenizer")
        marks = Bookmarks(self.work, self.done.reports, self._target.sync, self._events)
        team = None if self._crew is None else self._crew.team()
        how = (run.job.seed, self._options.max_memory, team, self._options.device, self._options.kept_text)
        session = Session(run.source, run.model, run.plan, calibration, *how)
        yield from solve_blocks(session, tokenizer, marks, run.hessian_bytes)

    def _fell_back(self, fallback: Fallback) -> None:
        """Something could not be calibrated: a line for each kind of failure, and the exception kept.

        Raises:
            Exception: the failure itself, if the run is strict.
        """
        if self._options.strict:
            raise fallback.error
        facts = fallback.to_dict()
        if all(fallback.why != known["why"] for known in self.fallbacks):
            progress.say(fallback.line())
        self.fallbacks.append(facts)
        self._events.write("fallback", **facts)

    def _measured(self, acts: ActivationCost) -> None:
        """Activations that were left to measurement are decided."""
        self.acts = acts
        costs = f"KL {acts.kl_int8:.4f} with int8 activations, {acts.kl_float:.4f} with float ones"
        progress.say(f"activations: {acts.choice} ({costs}, over {acts.tokens} tokens of the calibration text)")
        self._events.write("activations", choice=acts.choice, **asdict(acts))

    def _write_solved(self, solved: Solved) -> TensorReport:
        decision, q = solved.decision, solved.qtensor
        error = relative_error(solved.weight, q)
        flags = [
            *weight_flags(solved.weight, table=decision.site.is_table),
            *flags_of_error(decision, error if solved.coded is None else solved.coded),
            *solved.flags,
        ]
        return self._finish(Made(decision, stored_value(decision, q, solved.sides), error, flags), solved.output_error)

    def _data_free(self) -> Iterator[Made]:
        """What is left, in the source's order; from other processes as it comes."""
        run, done = self.run, self.done.reports
        left = [item for item in run.plan.items if left_of(item, done)]
        if self._crew is not None:
            yield from self._crew.made(left, self._times, done)
            return
        for item in left:
            yield from make_item(run.source, run.model, item, run.job.seed, done, self._options.device)

    def _finish(self, made: Made, output_error: float | None = None) -> TensorReport:
        """Write a plain tensor, or the fields of a packed one; note it in the journal, tell of it."""
        decision, value = made.decision, made.value
        if isinstance(value, Mapping):
            hashes = self._target.pack(decision.tensor, value)
        else:
            hashes = self._target.write(decision.tensor, value)
        return self._note(decision, hashes, {**made.facts(), "output_error": output_error})

    def _note(self, decision: Decision, hashes: dict[str, str], facts: dict[str, Any]) -> TensorReport:
        """In the journal, and to whom it may concern."""
        report = decision.report(decision.nbytes(), **facts)
        self.work.journal.append(
            {"kind": "tensor", "tensor": decision.tensor, "hashes": hashes, "report": asdict(report)}
        )
        self.done.reports[decision.tensor] = report
        self.done.hashes |= hashes
        self._events.write("tensor", **report.to_dict())
        if self._sender is not None:
            self._sender.wrote(hashes)
        return report

    def folder(self, report: QuantizeReport) -> Path:
        """Everything but the tensors: index, config, side files, card, manifest; then it gets its name.

        Returns: that; of a single file the file, or the first of its parts.

        Raises:
            AccountingError: what was written is not what was planned; or, if the run is strict, something was flagged.
        """
        run = self.run
        try:
            self._complete(report)
        except OSError as error:
            raise written_error(error, self.work.result, "cannot be completed") from error
        check_written(run.plan, report.tensors, self._target)
        if self._target.single is None and self._sender is None:
            write_manifest(self.work.result, run.account.totals())
        if self._options.strict and report.flagged:
            refuse_flagged(report)
        if self._sender is not None:
            self._sender.finish()
        return self.work.publish()

    def _complete(self, report: QuantizeReport) -> None:
        run, result = self.run, self.work.result
        if self._target.single is None:
            run.source.copy_side_files(result)
        dtypes = (run.source.info(name).dtype for name in run.source.names())
        self._target.finish(skeleton.with_dtype(run.source.config, dtypes), _quantization(run, report))
        if self._target.single is None:
            write_card(result, report)
            if run.chosen:
                (result / _RECIPE).write_text(run.job.rules.dumps(), encoding="utf-8")


def refuse_flagged(report: QuantizeReport) -> None:
    """AccountingError that names the first flagged tensors."""
    first = "; ".join(f"{t.tensor}: {', '.join(t.flags)}" for t in report.flagged[:5])
    more = f" and {len(report.flagged) - 5} more" if len(report.flagged) > 5 else ""
    hint = "without --strict the same command finishes at once; or keep these tensors with --ignore"
    raise AccountingError(f"{len(report.flagged)} tensors are flagged: {first}{more}", where=report.source, hint=hint)


def _quantization(run: PlannedRun, report: QuantizeReport) -> dict[str, Any]:
    entries = run.plan.entries(run.job.seed, auto="float" if report.acts is None else report.acts["choice"])
    kept = {t.tensor: t.reason for t in report.tensors if t.format is None}
    more = {} if report.acts is None else {"activations": report.acts}
    return describe(entries, kept, run.plan.unused(), recipe=report.recipe, **more)
