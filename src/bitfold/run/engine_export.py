"""Runs that end in a folder for another engine: which format and method, and what the engine cannot hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from bitfold.checkpoints import Source
from bitfold.checkpoints.base import Target
from bitfold.checkpoints.packed.written import PackedFolder, held_of
from bitfold.errors import CheckpointError, UsageError
from bitfold.planning.decisions import Decision, Kept, Quantized
from bitfold.planning.plan import Item, Plan
from bitfold.recipes.catalog import AUTO, find_method
from bitfold.recipes.options import MethodOptions, choose_recipe
from bitfold.recipes.recipe import Recipe
from bitfold.run.options import Request
from bitfold.transforms import TransformSpec

_GROUPS = (128, 64, 32)
_AWQ = "awq"  # always has zero points
_ROUNDED_FROM = 8  # bits from which on rounding to nearest is enough


def check_engine_options(wanted: MethodOptions) -> None:
    """UsageError where nothing says what is to be made."""
    if wanted.recipe is None and wanted.bits is None and wanted.format is None:
        raise UsageError("the engine has several formats", where="--export", hint="say --bits 4, or --format nvfp4")


def engine_rules(
    request: Request, source: Source, why_not: Callable[[], str | None]
) -> tuple[Recipe, str, tuple[str, ...]]:
    """The rules of such a run, the method and why it was chosen; see `export_rules`."""
    wanted, why = request.wanted, ""
    if wanted.recipe is not None:
        return choose_recipe(wanted), why, ()
    if wanted.format is None:
        group = wanted.group_size if wanted.group_size is not None else _group(source, wanted.bits or 0)
        wanted = replace(wanted, bits=None, format=_format(request.export or "", wanted, group), group_size=None)
    if wanted.method in (None, AUTO):
        wanted, why = _chosen(wanted, request.wanted.bits, why_not)
    if wanted.transform is None and find_method(str(wanted.method)).choices.get("transform") == "hadamard":
        wanted = replace(wanted, transform="none")  # no engine can undo a rotation
    return choose_recipe(wanted), why, ()


def _format(export: str, wanted: MethodOptions, group: int) -> str:
    """Integers of so many bits: symmetric, which every engine runs, but for AWQ."""
    if wanted.act is not None and wanted.act != "float":
        return f"int{wanted.bits}"  # one scale for each row, which integer products want
    asym = "-asym" if export == _AWQ else ""
    return f"int{wanted.bits}{asym}" + (f"-g{group}" if group > 0 else "")


def _group(source: Source, bits: int) -> int:
    """The largest of the usual groups that divides the rows of most weights; 0: a row, where 8 bits need no groups."""
    if bits >= _ROUNDED_FROM:
        return 0
    shapes = (source.info(name).shape for name in source.names())
    rows = Counter[int]()
    for shape in shapes:
        if len(shape) == 2:
            rows[shape[1]] += shape[0] * shape[1]
    return max(_GROUPS, key=lambda group: (sum(n for k, n in rows.items() if k % group == 0), group))


def _chosen(wanted: MethodOptions, bits: int | None, why_not: Callable[[], str | None]) -> tuple[MethodOptions, str]:
    calibrated = bits is not None and bits < _ROUNDED_FROM
    if not calibrated:
        return replace(wanted, method="rtn"), "rtn: such a format loses little without calibration"
    obstacle = why_not()
    if obstacle is not None:
        return replace(wanted, method="rtn"), f"rtn, without calibration: {obstacle}"
    return replace(wanted, method="ldlq"), "ldlq: errors fed forward, in the basis that engines know"


def held_by_engine(plan: Plan, target: Target) -> tuple[Plan, tuple[str, ...]]:
    """The plan with what the engine can hold: layers whose shapes it cannot stay plain, factors that would have to be
    stored are not chosen; and in words, what stays plain.

    Raises:
        CheckpointError: a format or a transform that the engine does not know, whatever the shape; or nothing fits.
    """
    assert isinstance(target, PackedFolder)
    changed: dict[str, Decision] = {}
    refused: dict[str, CheckpointError] = {}
    for decision in plan.quantized:
        found = _without_stored_factors(decision)
        entry = found.entry(0)
        if entry is not None:
            what = held_of(decision.tensor, entry)
            try:
                target.check(decision.tensor, what, entry)
            except CheckpointError as error:
                refused[decision.tensor] = error
                reason = f"{target.program} cannot hold it: {error.what}"
                changed[decision.tensor] = Kept(decision.tensor, decision.info, reason)
                continue
        changed[decision.tensor] = found
    if refused and len(refused) == len(plan.quantized):
        raise next(iter(refused.values()))
    return _with(plan, changed), tuple(_words(refused))


def _without_stored_factors(decision: Quantized) -> Quantized:
    if not decision.scheme.transform.diagonal or decision.fold is not None:
        return decision
    reason = f"{decision.reason}; no layer before takes factors of its inputs, and the engine has no place for them"
    return replace(decision, scheme=replace(decision.scheme, transform=TransformSpec("none")), reason=reason)


def _words(refused: Mapping[str, CheckpointError]) -> list[str]:
    first: dict[str, tuple[str, int]] = {}
    for name, error in refused.items():
        known, count = first.get(error.what, (name, 0))
        first[error.what] = (known, count + 1)
    return [f"{count} tensors, such as {name}, stay as they are: {what}" for what, (name, count) in first.items()]


def _with(plan: Plan, changed: Mapping[str, Any]) -> Plan:
    return Plan(
        tuple(Item(item.target, {n: changed.get(n, d) for n, d in item.decisions.items()}) for item in plan.items)
    )
