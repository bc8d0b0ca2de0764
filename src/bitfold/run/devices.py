"""Runs on an accelerator: what can be done there, and what is refused in words instead of being done on the CPU."""

from __future__ import annotations

from bitfold.calibration.shape import walk_shape
from bitfold.errors import UsageError
from bitfold.executors.opening import LOCAL
from bitfold.models.sites import EXPERTS
from bitfold.planning.decisions import Quantized
from bitfold.run.options import Request, RunOptions
from bitfold.run.writing import PlannedRun
from bitfold.system.backend import require_doubles

_CPU = "--device cpu does it"


def check_device(request: Request, options: RunOptions) -> None:
    """UsageError for a run on an accelerator that would be done on the CPU in part, as far as can be seen at once."""
    if options.device.type == "cpu":
        return
    others = {
        "--export": request.export is not None,
        request.budget_flag or "--target-size": request.budget_flag is not None,
        "--low-disk": options.low_disk,
        "--executor": options.executor != LOCAL,
    }
    if wanted := [flag for flag, given in others.items() if given]:
        raise UsageError(f"{', '.join(wanted)} works on the CPU only", where="--device", hint=_CPU)


def check_device_plan(run: PlannedRun, options: RunOptions) -> None:
    """UsageError, with the name of the tensor, for what cannot be quantized on the accelerator."""
    if options.device.type == "cpu":
        return
    chains = tuple(f"{chain.path}." for chain in walk_shape(run.model).chains)
    for decision in run.plan.quantized:
        found = _obstacle(decision, chains)
        if found is not None:
            raise UsageError(f"{found}, and not on {options.device}", where=decision.tensor, hint=_CPU)
        if decision.scheme.needs_text:
            require_doubles(options.device, "the factor of a Hessian")


def _obstacle(decision: Quantized, chains: tuple[str, ...]) -> str | None:
    """What of it is done on the CPU only."""
    scheme, site = decision.scheme, decision.site
    if scheme.format.grid is None and scheme.format.code is None and not scheme.format.plain:
        return f"{scheme.format.name} is encoded on the CPU"
    if scheme.sparsity is not None:
        return "weights are pruned on the CPU"
    if scheme.transform.diagonal:
        return "factors of input channels are found on the CPU"
    if scheme.solver.tunes_blocks:
        return f"{scheme.solver.name} tunes blocks on the CPU"
    if not scheme.needs_text:
        return None
    if site.kind == EXPERTS:
        return "stacks of experts are calibrated on the CPU"
    inside = site.is_table or decision.tensor.startswith(chains)
    return None if inside else "layers that are in no list of blocks are calibrated on the CPU"
