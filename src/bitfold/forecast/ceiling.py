"""What a run does to stay under a ceiling of memory: decided beforehand, from its estimate.

First the Hessians of fewer experts at a time: that costs time and changes nothing. Then, only under a ceiling that was
named, wide layers are solved in ranges of their inputs (see hessian.py): that changes the result, so it is said, it
is part of what a run is recognised by, and how much memory happens to be free never decides it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from bitfold.calibration.options import Calibration
from bitfold.calibration.runner import HESSIANS
from bitfold.calibration.session import check_ranges, in_ranges
from bitfold.checkpoints import Source
from bitfold.errors import UsageError
from bitfold.forecast.memory import Stage, peak, stages
from bitfold.methods.hessian import ALIGNED
from bitfold.models.sites import EXPERTS
from bitfold.planning.plan import Plan
from bitfold.system import memory

NARROWEST = 4 * ALIGNED  # inputs: what ranges are never narrower than
_MOST = 16  # ranges of a layer
_CLOSE = 0.97  # of a ceiling: estimates are a few per cent off, and the next way is safer than a run that has to stop


@dataclass(frozen=True)
class MemoryUse:
    """How a run goes about its memory.

    Args:
        calibration: of the run, ranges of inputs chosen; None for a data-free run.
        hessian_bytes: bytes of the Hessians of experts in memory at a time.
        found: the stages of the run, the largest first.
    """

    calibration: Calibration | None
    hessian_bytes: int
    found: list[Stage]

    @property
    def peak(self) -> int:
        """Bytes of the whole process at its largest."""
        return peak(self.found, memory.resident() or 0)


@dataclass(frozen=True)
class MemoryChooser:
    """Chooses for one run.

    Args:
        source, model, plan: of the run.
        calibration: as it was asked for.
        before: ranges of inputs that an interrupted run of the same output chose.
    """

    source: Source
    model: nn.Module | None
    plan: Plan
    calibration: Calibration | None
    before: int | None = None

    def choose(self, named: int | None) -> MemoryUse:
        """The first way of going about it that fits under the ceiling with a little to spare; else the most frugal one.

        Args:
            named: the ceiling that was asked for, bytes; None = what is free decides, and only what changes no byte of
                the result is done for it.

        Raises:
            UsageError: ranges were asked for of a method that cannot take them.
        """
        if self.calibration is not None:
            check_ranges(self.plan.quantized, self.calibration)
        limit = memory.default_ceiling() if named is None else named
        best: MemoryUse | None = None
        for way in self._ways(named is not None):
            best = way
            if limit is None or way.peak <= _CLOSE * limit:
                break
        assert best is not None
        return best

    def _ways(self, named: bool) -> Iterator[MemoryUse]:
        """From the most generous to the most frugal."""
        if self.calibration is None:
            yield self._with(None, HESSIANS)
            return
        given = replace(self.calibration, columns=self.calibration.columns or self.before)
        experts = any(d.site.kind == EXPERTS for d in self.plan.quantized)
        for hessian_bytes in (HESSIANS, *((HESSIANS >> 2, HESSIANS >> 4, 1) if experts else ())):
            yield self._with(given, hessian_bytes)
        for columns in self._columns() if named and given.columns is None else ():
            yield self._with(replace(given, columns=columns), 1 if experts else HESSIANS)

    def _columns(self) -> list[int]:
        """Widths of ranges to try, the widest first; none if a method cannot take ranges."""
        assert self.calibration is not None
        everything = replace(self.calibration, columns=NARROWEST)
        wide = [d for d in self.plan.quantized if in_ranges(d, everything)]
        try:
            check_ranges(self.plan.quantized, everything)
        except UsageError:
            return []
        k = max((d.site.qshape[-1] for d in wide), default=0)
        widths = {math.ceil(k / parts / ALIGNED) * ALIGNED for parts in range(2, _MOST + 1)}
        return sorted((width for width in widths if NARROWEST <= width < k), reverse=True)

    def _with(self, calibration: Calibration | None, hessian_bytes: int) -> MemoryUse:
        return MemoryUse(
            calibration, hessian_bytes, stages(self.source, self.plan, calibration, self.model, hessian_bytes)
        )
