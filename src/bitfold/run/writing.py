"""One run from its plan to its folder: every tensor quantized or kept, written, noted in the journal, told of.

What an earlier run of the same identity has finished is checked by its hashes and not done again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
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
from bitfold.methods.anomalies import error_flags, kept_flags, weight_flags
from bitfold.models import skeleton
from bitfold.models.swap import in_basis, quantize_site_tensor, transform_of
from bitfold.planning.accounting import Account, check_written
from bitfold.planning.decisions import Decision, Quantized, Tied
from bitfold.planning.plan import Item, Plan
from bitfold.planning.row_slices import in_pieces, quantize_pieces, read_pieces
from bitfold.qtensor import QTensor
from bitfold.recipes.recipe import Recipe
from bitfold.records.card import write_card
from bitfold.records.run_report import QuantizeReport, TensorReport, relative_error
from bitfold.run.low_disk import Sender
from bitfold.run.options import RunOptions
from bitfold.system import progress
from bitfold.system.memory import Ceiling
from bitfold.transforms.activations import ACT_SCALE
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
    """

    def __init__(
        self, run: PlannedRun, work: Workspace, events: Events, options: RunOptions, times: Mapping[str, float]
    ) -> None:
        self.run, self.work, self._events, self._options, self._times = run, work, events, options, times
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
                    yield self._finish(solved.decision, solved.value)
                else:
                    yield self._write_solved(solved)
                del solved  # it holds the weight as it was
        for item in self.run.plan.items:
            if any(not isinstance(d, Tied) and name not in self.done.reports for name, d in item.decisions.items()):
                yield from self._write_item(item)

    def _calibrated(self, calibration: Calibration) -> Iterator[Outcome]:
        run = self.run
        tokenizer = tokenizer_folder(run.source, self.work.state / "tokenizer")
        marks = Bookmarks(self.work, self.done.reports, self._target.sync, self._events)
        session = Session(run.source, run.model, run.plan, calibration, run.job.seed, self._options.max_memory)
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
        flags = (
            *weight_flags(solved.weight, table=decision.site.is_table),
            *_error_flags(decision, error if solved.coded is None else solved.coded),
            *solved.flags,
        )
        value = _value(decision, q, solved.sides)
        return self._finish(decision, value, error=error, output_error=solved.output_error, flags=flags)

    def _write_item(self, item: Item) -> Iterator[TensorReport]:
        only = next(iter(item.decisions.values()))
        if in_pieces(self.run.source, item, only):
            yield self._write_pieces(item, only)
            return
        tensors = item.target.read(self.run.source.read, self.run.model)
        for name in list(tensors):
            w, decision = tensors.pop(name), item.decisions[name]
            if isinstance(decision, Tied) or name in self.done.reports:
                continue
            if isinstance(decision, Quantized):
                yield self._write_quantized(decision, w)
            else:
                w = w.to(decision.info.dtype)
                yield self._finish(decision, w, flags=tuple(kept_flags(w)))

    def _write_pieces(self, item: Item, decision: Decision) -> TensorReport:
        """A tensor that is too large to be in memory at once without need."""
        if isinstance(decision, Quantized):
            q, error, odd = quantize_pieces(self.run.source, item, decision, self.run.job.seed)
            return self._finish_quantized(decision, q, error, odd)
        found: list[str] = []

        def rows() -> Iterator[torch.Tensor]:
            for w in read_pieces(self.run.source, item, decision):
                found.extend(kept_flags(w))
                yield w.to(decision.info.dtype)

        hashes = self._target.write(decision.tensor, rows())
        return self._note(decision, hashes, decision.info.nbytes, {"flags": tuple(found[:1])})

    def _write_quantized(self, decision: Quantized, w: torch.Tensor) -> TensorReport:
        scheme, site, seed = decision.scheme, decision.site, self.run.job.seed
        q = quantize_site_tensor(w, site, scheme, seed)
        original = in_basis(w, site, transform_of(scheme, site, seed))
        odd = weight_flags(original, table=site.is_table)
        return self._finish_quantized(decision, q, relative_error(original, q), odd)

    def _finish_quantized(self, decision: Quantized, q: QTensor, error: float, odd: list[str]) -> TensorReport:
        entry = decision.entry(self.run.job.seed)
        flags = (*odd, *_error_flags(decision, error))
        sides = {} if entry is None or entry.transform is None else entry.transform.fields()
        if decision.scheme.activations.static:
            sides = {**sides, ACT_SCALE: torch.zeros(1)}  # no data: each token by itself
        return self._finish(decision, _value(decision, q, sides), error=error, flags=flags)

    def _finish(
        self,
        decision: Decision,
        value: torch.Tensor | Mapping[str, torch.Tensor],
        *,
        error: float | None = None,
        output_error: float | None = None,
        flags: tuple[str, ...] = (),
    ) -> TensorReport:
        """Write a plain tensor, or the fields of a packed one; note it in the journal, tell of it."""
        if isinstance(value, torch.Tensor):
            hashes = self._target.write(decision.tensor, [value])
        else:
            hashes = self._target.pack(decision.tensor, value)
        facts = {"error": error, "output_error": output_error, "flags": flags}
        return self._note(decision, hashes, decision.nbytes(), facts)

    def _note(self, decision: Decision, hashes: dict[str, str], nbytes: int, facts: dict[str, Any]) -> TensorReport:
        """In the journal, and to whom it may concern."""
        report = decision.report(nbytes, **facts)
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


def _value(
    decision: Quantized, q: QTensor, sides: Mapping[str, torch.Tensor]
) -> torch.Tensor | Mapping[str, torch.Tensor]:
    """What is stored: fields and what stands beside them, the model's tensor for plain formats."""
    return decision.site.restored(q.fields["values"]) if q.format.plain else {**q.fields, **sides}


def _error_flags(decision: Quantized, error: float) -> list[str]:
    scheme = decision.scheme
    if scheme.sparsity is not None:
        return []
    return error_flags(error, scheme.format, scheme.fit.name, feedback=scheme.solver.needs_hessian)


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
