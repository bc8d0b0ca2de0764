"""What a run will need and what will come out of it, before it begins.

Sizes are exact, memory is counted from shapes, time is measured on samples. A run that cannot keep its ceiling of
memory, or has no room on the disk, is refused here, with the numbers that would do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from bitfold.calibration.session import in_ranges
from bitfold.checkpoints import Source
from bitfold.checkpoints.targets import FOLDER, open_target
from bitfold.errors import ResourceError
from bitfold.forecast.ceiling import MemoryUse
from bitfold.forecast.memory import Stage, working_disk
from bitfold.forecast.time import seconds
from bitfold.models.rehearsal import rehearse
from bitfold.planning.accounting import rules_of
from bitfold.planning.decisions import Kept, Quantized
from bitfold.planning.plan import NO_SITE, Plan
from bitfold.system import memory
from bitfold.system.units import size_text
from bitfold.workspace.folder import free_bytes

_TIMED_FROM = 20_000_000  # weights; smaller runs are over before they are estimated
_MUCH = 0.1  # of the bytes of a model
_SPARE = 1.02  # of the disk: file systems need a little for themselves


@dataclass(frozen=True)
class Preflight:
    """What is known beforehand.

    Args:
        output_bytes: files of weights, headers included.
        disk_bytes: on the disk at the worst moment, activations included.
        peak_memory: resident, of the whole process.
        memory_for: what needs most of it.
        seconds: about; None for runs that are over in seconds.
        times: of each tensor, which make up `seconds`; empty for those runs.
        bpw_whole: bits per weight over everything.
        kept: tensors and bytes by the rule that keeps them.
        ragged: tensors whose rows the group size does not divide.
        engines: who will load the result, and why or why not.
        allowed: the ceiling that was named, or a share of what is free; None where nobody tells what is free.
        columns: inputs that are taken together at most; None = all.
        ranges: tensors whose inputs are more, and taken in ranges.
        rehearsal: what would go wrong when the quantized model is run; None where nothing is known to.
        unknown: what of the model stays as it is because nothing is known that it could be quantized as, in words; None
            where that is little.
        substitutes: what gets another format than was asked for, in words.
    """

    output_bytes: int
    disk_bytes: int
    peak_memory: int
    memory_for: str
    seconds: float | None
    bpw_whole: float
    kept: dict[str, dict[str, int]] = field(default_factory=dict)
    ragged: list[str] = field(default_factory=list)
    engines: dict[str, str] = field(default_factory=dict)
    allowed: int | None = None
    columns: int | None = None
    ranges: list[str] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    rehearsal: str | None = None
    unknown: str | None = None
    substitutes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with stable keys."""
        found = asdict(self)
        del found["times"]  # their sum says enough
        return found

    def summary(self) -> str:
        """One line."""
        time = "" if self.seconds is None else f", about {max(1, round(self.seconds / 60))} min"
        return (
            f"{size_text(self.output_bytes)} at {self.bpw_whole:.3f} bits per weight; needs"
            f" {size_text(self.peak_memory)} of memory ({self.memory_for}), {size_text(self.disk_bytes)} of disk{time}"
        )

    def cautions(self) -> Iterator[str]:
        """What should be known before it begins, in words."""
        if self.rehearsal is not None:
            yield f"{self.rehearsal} (tried without values, before anything is made; --ignore keeps layers as they are)"
        yield from self.substitutes
        if self.unknown is not None:
            yield f"not quantized: {self.unknown}"
        if self.ranges:
            yield (
                f"{len(self.ranges)} layers with more than {self.columns} inputs, such as {self.ranges[0]}, are solved"
                f" in ranges of at most {self.columns} inputs: it saves memory, and costs some accuracy"
            )
        if self.allowed is not None and self.peak_memory > self.allowed:
            yield (
                f"{size_text(self.peak_memory)} of memory are more than {memory.SHARE:.0%} of what is free"
                f" ({size_text(self.allowed)}): other programs may get into trouble; --max-memory makes do with less"
            )


@dataclass(frozen=True)
class Asked:
    """What a run was asked for, as far as an estimate depends on it.

    Args:
        seed: of the run.
        max_shard_bytes: size at which a new file is begun; None: as is usual of the kind.
        timed: whether time is to be estimated however small the run is.
        max_memory: the ceiling that was named; None = none.
        kind: what is written, see TARGETS.
    """

    seed: int
    max_shard_bytes: int | None
    timed: bool
    max_memory: int | None = None
    kind: str = FOLDER


def preflight(source: Source, model: nn.Module | None, plan: Plan, economy: MemoryUse, asked: Asked) -> Preflight:
    """Estimate a run that goes about its memory as `economy` says."""
    calibration, numel = economy.calibration, plan.numel
    target = open_target(asked.kind, Path(), asked.max_shard_bytes, source)
    output = target.size(plan.contents())
    timed = asked.timed or numel > _TIMED_FROM
    times = seconds(plan, calibration, model, asked.seed) if timed else {}
    return Preflight(
        output_bytes=output,
        disk_bytes=math.ceil(_SPARE * output) + working_disk(plan, calibration, model),
        peak_memory=economy.peak,
        memory_for=_largest(economy.found),
        seconds=sum(times.values()) if timed else None,
        times=times,
        bpw_whole=8 * sum(d.nbytes() for d in plan.decisions) / max(1, numel),
        kept=rules_of(plan.decisions),
        ragged=[d.tensor for d in plan.quantized if _is_ragged(d)],
        engines=engines(model, source, target.engines()),
        allowed=memory.default_ceiling() if asked.max_memory is None else asked.max_memory,
        columns=None if calibration is None else calibration.columns,
        ranges=[d.tensor for d in plan.quantized if calibration is not None and in_ranges(d, calibration)],
        rehearsal=None if model is None else rehearse(model, plan.entries(asked.seed)),
        unknown=_unknown(plan),
    )


def _unknown(plan: Plan) -> str | None:
    """Much of a model that no rule could have named: it would be told by the size of the result alone."""
    found = [d for d in plan.written if isinstance(d, Kept) and d.reason == NO_SITE]
    nbytes, whole = (sum(d.info.nbytes for d in some) for some in (found, plan.written))
    if not plan.quantized or nbytes < _MUCH * whole:
        return None
    largest = max(found, key=lambda d: d.info.nbytes).tensor
    what = f"{len(found)} tensors ({size_text(nbytes)}, {nbytes / whole:.0%} of the model), the largest {largest}"
    return f"{what}, stay as they are: {NO_SITE}"


def _largest(found: list[Stage]) -> str:
    return found[0].name if found else "nothing"


def _is_ragged(decision: Quantized) -> bool:
    scale = decision.scheme.format.scale
    return scale is not None and scale.block[1] > 0 and decision.site.qshape[-1] % scale.block[1] != 0


def engines(model: nn.Module | None, source: Source, others: Mapping[str, str]) -> dict[str, str]:
    """Who will load the result: "yes" or "no", and why.

    Args:
        model: the skeleton; None: transformers does not have the class.
        source: of the run.
        others: what the kind of checkpoint says of other programs than bitfold.
    """
    found = {"bitfold": "yes", "llama.cpp": "no: it reads GGUF files, and this is a folder of safetensors", **others}
    if model is None:
        name = (source.config.get("architectures") or ["this model's class"])[0]
        found["bitfold"] = f"yes, given the module: transformers does not have {name}"
        found["transformers"] = f"no: it does not have {name}"
    return found


def refuse_impossible(found: Preflight, out: Path, max_memory: int | None, has: int = 0) -> None:
    """ResourceError when the ceiling cannot be kept, the machine has not enough, or the disk is too full.

    Args:
        found: the estimate.
        out: the folder to be made.
        max_memory: the ceiling that was named; None = none.
        has: bytes of disk that an interrupted run has taken already.
    """
    if max_memory is not None and found.peak_memory > max_memory:
        raise ResourceError(
            f"{size_text(max_memory)} are not enough: {found.memory_for} takes the process to"
            f" {size_text(found.peak_memory)}",
            where="--max-memory",
            hint=f"the smallest ceiling that works is about {_rounded(found.peak_memory)}"
            f"{' (inputs in ranges of ' + str(found.columns) + ')' if found.ranges else ''}; "
            "fewer or shorter samples, or a data-free method (--method rtn), need less",
        )
    free = memory.available()
    if max_memory is None and free is not None and found.peak_memory > free + (memory.resident() or 0):
        raise ResourceError(
            f"{found.memory_for} takes the process to {size_text(found.peak_memory)}, {size_text(free)} are left",
            hint="free some, use a data-free method (--method rtn), or say --max-memory: what can be done to keep under"
            " it is then done, even where it costs some accuracy",
        )
    room = free_bytes(out.parent) + has
    if found.disk_bytes > room:
        what = f"needs {size_text(found.disk_bytes)} of room, {size_text(room)} are free"
        raise ResourceError(what, where=str(out), hint="make room, or choose an output folder on another disk")


def _rounded(nbytes: int) -> str:
    """Up to the next tenth of a gigabyte, as it can be typed; small ones to ten megabytes."""
    if nbytes < 10**9:
        return f"{math.ceil(nbytes / 1e7) * 10}MB"
    return f"{math.ceil(nbytes / 1e8) / 10:.1f}GB"
