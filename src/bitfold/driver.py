"""The driver: a checkpoint in, a quantized folder out, one tensor in memory at a time.

Plan first (names, shapes and rules only), then read, quantize and write tensor by tensor. Everything is written aside,
under a name that no loader looks at, and renamed when it is complete.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitfold import progress
from bitfold.calibrated import Calibration, solve_blocks
from bitfold.card import write_card
from bitfold.checkpoints import Source, open_source
from bitfold.checkpoints.native import QUANT_METHOD, VERSION
from bitfold.checkpoints.safetensors import ShardWriter, write_json
from bitfold.errors import CheckpointError, UsageError
from bitfold.groups import Solved
from bitfold.models import skeleton
from bitfold.models.swap import in_basis, is_plain, quantize_site_tensor, transform_of
from bitfold.options import choose_recipe
from bitfold.plan import Decision, Item, Plan, blank_report, make_plan
from bitfold.qtensor import QTensor
from bitfold.recipe import Recipe, Rule
from bitfold.report import QuantizeReport, TensorReport, peak_memory, relative_error
from bitfold.solvers import CALIBRATED
from bitfold.version import __version__

OnTensor = Callable[[TensorReport], None]


def quantize(
    src: str | Path,
    out: str | Path,
    *,
    bits: int | None = None,
    format: str | None = None,
    group_size: int | None = None,
    fit: str | None = None,
    solver: str | None = None,
    transform: str | None = None,
    act: str | None = None,
    ignore: Iterable[str] = (),
    recipe: Recipe | str | Path | None = None,
    calibration: Calibration | str | None = None,
    dry_run: bool = False,
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
        bits, format, group_size, fit, solver, transform, act, ignore, recipe: see `choose_recipe`.
        calibration: text for solvers that need it (see `Calibration`, or just its `text`); default: the text that comes
            with bitfold.
        dry_run: plan and report only; write nothing.
        seed: for solvers that draw random numbers.
        revision, token: of the Hub repository.
        upload_repo: push the finished folder there.
        max_shard_bytes: size at which a new shard is begun.
        on_tensor: called with the report of each tensor as it is written.

    Raises:
        BitfoldError: what is wrong, where, and what to do; nothing that looks whole is left behind.
    """
    rules = choose_recipe(
        bits=bits,
        format=format,
        group_size=group_size,
        fit=fit,
        solver=solver,
        transform=transform,
        act=act,
        ignore=ignore,
        recipe=recipe,
    )
    job = _Job(str(src), Path(out), rules, seed, _calibration(rules, calibration), max_shard_bytes)
    hub = _Hub(revision, token, None if dry_run else upload_repo)
    return _quantize(job, hub, shorten=bits is not None and group_size is None, dry_run=dry_run, on_tensor=on_tensor)


@dataclass(frozen=True)
class _Job:
    """What is to be done."""

    source: str
    out: Path
    rules: Recipe
    seed: int
    calibration: Calibration | None
    max_shard_bytes: int


@dataclass(frozen=True)
class _Hub:
    """Where the source comes from and where the result goes."""

    revision: str | None
    token: str | None
    upload_repo: str | None


def _quantize(job: _Job, hub: _Hub, *, shorten: bool, dry_run: bool, on_tensor: OnTensor | None) -> QuantizeReport:
    from bitfold.checkpoints.hub import check_login, resolve, upload

    started = time.perf_counter()
    if not dry_run:
        refuse_existing(job.out)
    if hub.upload_repo is not None:
        check_login(hub.token)  # before the work, not after it
    source = open_source(resolve(job.source, revision=hub.revision, token=hub.token))
    try:
        model = _open_model(source)
        plan = make_plan(source, model, job.rules, shorten_groups=shorten)
        report = blank_report(plan, job.source, None if dry_run else str(job.out), job.rules)
        if not dry_run:
            _write(_Run(source, model, plan, job), report, on_tensor)
    finally:
        source.close()
    report.seconds, report.peak_memory = time.perf_counter() - started, peak_memory()
    if hub.upload_repo is not None:
        report.url = upload(job.out, hub.upload_repo, token=hub.token)
    return report


def _calibration(rules: Recipe, given: Calibration | str | None) -> Calibration | None:
    """The calibration of a run; None when no rule needs one."""
    if not any(rule.solver in CALIBRATED for rule in rules.rules if not rule.keep):
        if given is not None:
            raise UsageError("no rule uses the calibration text", hint="--solver ldlq does")
        return None
    return given if isinstance(given, Calibration) else Calibration(given) if given is not None else Calibration()


def _open_model(source: Source) -> nn.Module | None:
    """The skeleton that says what each tensor is; a checkpoint that is quantized already is refused."""
    method = (source.config.get("quantization_config") or {}).get("quant_method")
    if method is not None or hasattr(source, "quantization"):
        raise CheckpointError(
            f"is quantized already ({method or QUANT_METHOD})",
            where=str(source.path),
            hint="quantize the original; quantizing twice loses twice",
        )
    model = skeleton.of_config(source.config, str(source.path))
    if model is None:
        warnings.warn(
            f"transformers does not have the class {source.config.get('architectures')}: what a tensor is, is judged"
            " by its name and shape, and bitfold.load will want the module (load(path, module=...))",
            stacklevel=2,
        )
    return model


def refuse_existing(out: Path) -> None:
    """CheckpointError when the output exists and is not an empty folder."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise CheckpointError("exists already", where=str(out), hint="choose another output folder, or remove it")


@dataclass(frozen=True)
class _Run:
    """A job with its source open."""

    source: Source
    model: nn.Module | None
    plan: Plan
    job: _Job


def _write(run: _Run, report: QuantizeReport, on_tensor: OnTensor | None) -> None:
    out = run.job.out
    partial = out.with_name(f".{out.name}.partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"cannot be made: {error}", where=str(partial)) from error
    try:
        writer = ShardWriter(partial, run.job.max_shard_bytes)
        with progress.bar("quantize", run.plan.numel) as bar:
            for done in _tensors(run, writer, partial):
                report.add(done)
                bar.advance(done.numel, done.tensor)
                if on_tensor is not None:
                    on_tensor(done)
        report.files = writer.close()
        run.source.copy_side_files(partial)
        dtypes = (run.source.info(name).dtype for name in run.source.names())
        config = skeleton.with_dtype(run.source.config, dtypes)
        write_json(partial / "config.json", {**config, "quantization_config": _config(run, report)})
        write_card(partial, report)
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _tensors(run: _Run, writer: ShardWriter, folder: Path) -> Iterator[TensorReport]:
    """Write every tensor: first what needs calibration, block by block, then the rest in the order of the source."""
    done: set[str] = set()
    if run.job.calibration is not None:
        for solved in _calibrated(run, folder):
            done.add(solved.decision.tensor)
            _add_fields(writer, solved.decision.tensor, solved.qtensor)
            error = relative_error(solved.weight, solved.qtensor)
            yield solved.decision.report(solved.qtensor.nbytes, error=error, output_error=solved.output_error)
    for item in run.plan.items:
        if not done.issuperset(item.target.names):
            yield from _write_item(run, item, writer, done)


def _calibrated(run: _Run, folder: Path) -> Iterator[Solved]:
    assert run.job.calibration is not None
    tokenizer = run.source.path
    if not tokenizer.is_dir():  # a GGUF file carries its tokenizer inside
        run.source.copy_side_files(folder)
        write_json(folder / "config.json", run.source.config)
        tokenizer = folder
    yield from solve_blocks(run.source, run.model, run.plan, run.job.calibration, run.job.seed, tokenizer)


def _write_item(run: _Run, item: Item, writer: ShardWriter, done: set[str]) -> Iterator[TensorReport]:
    tensors = item.target.read(run.source.read, run.model)
    for name in list(tensors):
        w = tensors.pop(name)
        decision = item.decisions[name]
        if decision.alias_of is not None or name in done:
            continue
        if decision.rule is None or decision.site is None:
            w = w.to(decision.info.dtype)
            writer.add(name, w)
            yield decision.report(w.numel() * w.element_size())
            continue
        yield _write_quantized(writer, name, w, decision.rule, decision, run.job.seed)


def _write_quantized(
    writer: ShardWriter, name: str, w: torch.Tensor, rule: Rule, decision: Decision, seed: int
) -> TensorReport:
    assert decision.site is not None
    q = quantize_site_tensor(w, decision.site, rule, seed)
    if is_plain(q.format):
        values = q.fields["values"]
        writer.add(name, values.transpose(-1, -2) if decision.site.transposed else values)
    else:
        _add_fields(writer, name, q)
    original = in_basis(w, decision.site, transform_of(rule, decision.site, seed))
    return decision.report(q.nbytes, error=relative_error(original, q))


def _add_fields(writer: ShardWriter, name: str, q: QTensor) -> None:
    for field, tensor in q.fields.items():
        writer.add(f"{name}.{field}", tensor)


def _config(run: _Run, report: QuantizeReport) -> dict[str, Any]:
    entries = run.plan.entries(run.job.seed)
    return {
        "quant_method": QUANT_METHOD,
        "version": VERSION,
        "bitfold": __version__,
        "formats": {e.format.name: e.format.describe() for e in entries.values()},
        "tensors": {name: entry.to_dict() for name, entry in entries.items()},
        "kept": {t.tensor: t.reason for t in report.tensors if t.format is None},
        "unused": run.plan.unused(),
        "recipe": report.recipe,
    }
