"""The driver: a checkpoint in, a quantized folder out, one tensor in memory at a time.

Plan first (names, shapes and rules only), then read, quantize and write tensor by tensor. Everything is written aside,
under a name that no loader looks at, and renamed when it is complete; a run that was cut short is gone on with.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bitfold.calibration.options import Calibration
from bitfold.errors import ResourceError
from bitfold.executors.opening import LOCAL, open_executor
from bitfold.executors.protocol import Executor
from bitfold.recipes.options import MethodOptions
from bitfold.recipes.recipe import Recipe
from bitfold.records.run_report import QuantizeReport
from bitfold.run.devices import check_device_plan
from bitfold.run.kept_plan import forget_plans
from bitfold.run.options import OnTensor, Request, RunOptions
from bitfold.run.steps import check, execute, forecast, open_model, plan, record, report_of
from bitfold.system.backend import find_device, within_memory


@contextmanager
def _as_many_threads(executor: Executor) -> Iterator[None]:
    """What is solved here is solved with the threads of a worker: another number would make other bytes."""
    before = torch.get_num_threads()
    torch.set_num_threads(executor.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(request: Request, options: RunOptions) -> QuantizeReport:
    """One run: open, plan, forecast, execute, record. See `quantize`."""
    started = time.perf_counter()
    check(request, options)
    name = LOCAL if options.dry_run else options.executor
    with (
        open_model(request, options) as opened,
        open_executor(name, options.workers) as executor,
        _as_many_threads(executor),
        within_memory(options.device),
    ):
        planned = plan(opened, request, options)
        check_device_plan(planned, options)
        try:
            expected = forecast(planned, options, executor)
        except ResourceError as error:
            if not (request.wanted.leaves_the_choice or request.budget_flag) or planned.job.calibration is None:
                raise
            expected = forecast(plan(opened, request, options, obstacle=error.what), options, executor)
        report = report_of(expected, options) if options.dry_run else execute(expected, options, executor)
    if not options.dry_run:
        forget_plans(request.out)
    return record(report, expected.run.job, options, started)


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
    keep_embeddings: bool = False,
    calibration: Calibration | str | None = None,
    export: str | None = None,
    target_bytes: int | None = None,
    target_bpw: float | None = None,
    imatrix: str | Path | None = None,
    dry_run: bool = False,
    max_memory: int | None = None,
    restart: bool = False,
    strict: bool = False,
    events: str | Path | None = None,
    seed: int = 0,
    revision: str | None = None,
    token: str | None = None,
    upload_repo: str | None = None,
    max_shard_bytes: int | None = None,
    on_tensor: OnTensor | None = None,
    executor: str = LOCAL,
    workers: int | None = None,
    device: str | torch.device = "cpu",
) -> QuantizeReport:
    """Quantize a checkpoint into a new folder, streaming tensor by tensor.

    Args:
        src, out: a local Hugging Face folder, a GGUF file, or a Hub id; the folder to make, which must not exist.
        bits, format, group_size, fit, method, transform, act, prune, ignore, recipe, keep_embeddings: see
            `MethodOptions`; bits alone (but for act and ignore), or the method "auto", leave the choice of the method
            to bitfold.
        calibration: text for methods that need it (see `Calibration`, or just its `text`); default: bitfold's own.
        export, target_bytes, target_bpw, imatrix: another output than a bitfold folder, or its size, see `Request`.
        dry_run, max_memory: plan only, and write nothing; ceiling on the resident memory of the process and its workers
            together, kept (wide layers are solved in ranges of their inputs) or refused; None = what is free.
        device: "cpu", "cuda", "mps", "xpu" or "auto"; restart, strict, events, seed, revision, token, upload_repo,
            max_shard_bytes, on_tensor, executor, workers: see `RunOptions`. Scripts call this below
            `if __name__ == "__main__":` where other processes do the work.

    Raises:
        BitfoldError: what is wrong, where, and what to do. Nothing that looks whole is left behind; finished work stays
            beside `out`, and the same call goes on with it.
    """
    said = (bits, format, group_size, fit, method, transform, act, prune, tuple(ignore), recipe)
    wanted = MethodOptions(*said, keep_embeddings)
    log, costs = (None if path is None else Path(path) for path in (events, imatrix))
    how = (seed, max_shard_bytes, max_memory, dry_run, restart, strict, log, revision, token, upload_repo, on_tensor)
    options = RunOptions(*how, executor=executor, workers=workers, device=find_device(device))
    return run(Request(str(src), Path(out), wanted, calibration, export, target_bytes, costs, target_bpw), options)
