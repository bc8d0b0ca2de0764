"""How long a run will take: from small samples of its own work, measured on this machine a moment before.

Rounding is measured on rows of the largest tensor of each scheme; the walk of a calibrated run from the speed of matrix
products and factorizations, counted in operations, and the coding of columns on a few rows of the widest layer.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn

from bitfold.calibration.one_layer import solve
from bitfold.calibration.options import Calibration
from bitfold.calibration.runner import HESSIANS
from bitfold.calibration.session import compares, weighs_tokens
from bitfold.calibration.shape import window
from bitfold.errors import BitfoldError
from bitfold.forecast.work import BlockWork, work_of
from bitfold.methods.hessian import column_ranges
from bitfold.models.swap import in_basis, quantize_site_tensor, transform_of
from bitfold.planning.decisions import Quantized
from bitfold.planning.plan import Plan
from bitfold.qtensor import QTensor
from bitfold.recipes.scheme import Scheme
from bitfold.records.run_report import relative_parts

_SAMPLE = 1 << 19  # weights quantized to see how fast it goes
_BYTES = 1 << 23  # hashed and written for the same reason


def seconds(plan: Plan, calibration: Calibration | None, model: nn.Module | None, seed: int) -> dict[str, float]:
    """Of the whole run, about: for each tensor that is written, what comes before the first one counted with it."""
    found = {d.tensor: (d.info.nbytes + d.nbytes()) * _seconds_per_byte() for d in plan.written}
    work = [] if calibration is None or model is None else work_of(plan, model)
    walked = {d.tensor for block in work for d in block.wanted}
    rates: dict[Scheme, float] = {}
    for d in sorted(plan.quantized, key=lambda d: -d.info.numel):
        if d.tensor in walked:
            continue
        if d.scheme not in rates:
            rates[d.scheme] = _rounding_rate(d, seed)
        found[d.tensor] += rates[d.scheme] * d.info.numel
    if calibration is not None and model is not None:
        for name, more in _calibrated(plan, calibration, (model, work), seed).items():
            found[name] += more
    return found


def _timed(work: Callable[[], Any]) -> float:
    """Seconds where nothing else runs; the better of two, after which caches and lazy imports are warm.

    Time on the clock, but never more than the processors worked: what others take away meanwhile is not the work's.
    """
    found = []
    for _ in range(2):
        clock, worked = time.perf_counter(), time.process_time()
        work()
        found.append(min(time.perf_counter() - clock, time.process_time() - worked))
    return min(found)


def _rounding_rate(decision: Quantized, seed: int) -> float:
    """Seconds for each weight."""
    site, scheme = decision.site, decision.scheme
    *_, n, k = site.qshape
    rows = max(1, min(n, _SAMPLE // k))
    w = torch.randn(rows, k, generator=torch.Generator().manual_seed(0)).to(decision.info.dtype) * 0.02
    part = replace(site, shape=(rows, k), transposed=False, experts=None)

    def work() -> None:
        q = quantize_site_tensor(w, part, scheme, seed)
        relative_parts(in_basis(w, part, transform_of(scheme, part, seed)), q)

    try:
        return _timed(work) / w.numel()
    except BitfoldError:
        return 0.0  # the run itself will say it better


@cache
def _seconds_per_byte() -> float:
    raw = bytes(_BYTES)
    return 3 * _timed(lambda: hashlib.sha256(raw).digest()) / _BYTES


@cache
def _product_rate() -> float:
    """Seconds for each operation of a float32 product."""
    a = torch.ones(768, 768)
    return _timed(lambda: a @ a) / (2 * 768**3)


@cache
def _factor_rate() -> float:
    """Seconds for each operation of a float64 factorization."""
    a = torch.eye(768, dtype=torch.float64)
    return _timed(lambda: torch.linalg.cholesky(a)) / (768**3 / 3)


def _coding_seconds(d: Quantized, n: int, seed: int) -> float:
    """Coding n rows of a layer column by column: what each column costs, and what each weight."""
    k = d.site.qshape[-1]
    few = max(1, min(n, _SAMPLE // (4 * k)))
    times = []
    for rows in (few, 2 * few):
        w = torch.randn(rows, k, generator=torch.Generator().manual_seed(0))

        def work(w: torch.Tensor = w) -> QTensor:
            return solve(d.scheme, w, None, seed, d.tensor)[0]

        try:
            times.append(_timed(work))
        except BitfoldError:
            return 0.0
    each = max(0.0, times[1] - times[0]) / few
    return max(times[0] - each * few, 0.0) + each * n


def _calibrated(
    plan: Plan, calibration: Calibration, walked: tuple[nn.Module, list[BlockWork]], seed: int
) -> dict[str, float]:
    """The walk, block by block, shared out among its tensors; blocks of the same shapes take the same time."""
    model, work = walked
    tokens = calibration.nsamples * window(calibration.seqlen, model)
    before = 0.0
    if weighs_tokens(plan.quantized, calibration):
        # Forward, forward again inside the backward pass, gradients of activations.
        before = 3 * 2 * tokens * plan.numel * _product_rate()
    if any(block.whole for block in work):
        heard = sum(4 * group.k**2 for block in work if block.whole for group in block.groups)
        before += (1 + heard // HESSIANS) * 2 * tokens * plan.numel * _product_rate()
    known: dict[tuple[Any, ...], float] = {}
    # What the quantized model takes, the passes that stop at a group, the original.
    passes = 2.5 + compares(plan.quantized, calibration)
    found: dict[str, float] = {}
    for block in work:
        shape = tuple((d.info.shape, d.scheme if isinstance(d, Quantized) else None) for d in block.decisions)
        if shape not in known:
            known[shape] = _block(block, calibration, tokens, 0.0 if block.whole else passes, seed)
        weights = sum(d.info.numel for d in block.wanted)
        found |= {d.tensor: (known[shape] + before) * d.info.numel / weights for d in block.wanted}
        before = 0.0
    return found


def _block(work: BlockWork, calibration: Calibration, tokens: int, passes: float, seed: int) -> float:
    """One block of the walk; `tokens` in all, `passes` of them through the block."""
    weights, corrects = sum(d.info.numel for d in work.decisions), calibration.drift > 0
    products, factors, coding = 2.0 * passes * tokens * weights, 0.0, 0.0
    for group in work.groups:
        k, n = group.k, group.n
        for part in (p.stop - p.start for p in column_ranges(k, calibration.columns)):
            products += 2.0 * (1 + corrects) * tokens * part**2 + 2.0 * (5 + corrects) * n * part**2
            factors += (1 + corrects) * part**3 / 3 + corrects * 2.0 * n * part**2
        coding += _coding_seconds(group.first, n, seed)
    return products * _product_rate() + factors * _factor_rate() + coding
