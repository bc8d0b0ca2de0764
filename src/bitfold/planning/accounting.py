"""Where every tensor and every byte of a source went.

Three lists are held against each other: what lies in the source's files, what the plan says of it, what was written.
Every stored tensor has one fate; bytes are counted in the files, independently of the code that reads tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from bitfold.checkpoints.base import Source, Target
from bitfold.errors import AccountingError
from bitfold.planning.decisions import Decision, Kept, Packed, Quantized, Tied, Unused
from bitfold.planning.plan import Item, Plan
from bitfold.records.run_report import TensorReport

QUANTIZED, KEPT, TIED, UNUSED, FOLDED = "quantized", "kept", "tied", "unused", "folded"


@dataclass(frozen=True)
class Fate:
    """What became of one stored tensor of the source.

    Args:
        tensor: its name in the source.
        nbytes: its bytes in the file.
        fate: "quantized", "kept" (by a rule that `reason` names), "tied" (another tensor stands for it), "unused"
            (carried along, the model class has no place for it) or "folded" (into the config).
        into: tensors of the model that it became part of.
        reason: the rule.
    """

    tensor: str
    nbytes: int
    fate: str
    into: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Account:
    """All of them."""

    fates: tuple[Fate, ...]

    def totals(self) -> dict[str, dict[str, int]]:
        """Number and bytes of the tensors of each fate, and of all."""
        count, size = Counter(f.fate for f in self.fates), Counter[str]()
        for fate in self.fates:
            size[fate.fate] += fate.nbytes
        parts = {name: {"tensors": count[name], "bytes": size[name]} for name in sorted(count)}
        return {**parts, "all": {"tensors": len(self.fates), "bytes": sum(size.values())}}


def account_for(source: Source, plan: Plan) -> Account:
    """The fate of every tensor that the source's files hold.

    Raises:
        AccountingError: a tensor without a fate or with two, a fate without a tensor, bytes that do not add up.
    """
    stored = source.stored_bytes()
    fates: dict[str, Fate] = {}
    for item in plan.items:
        for name in _stored_names(item):
            if name in fates:
                raise AccountingError("is used twice", where=name, hint=_REPORT)
            if name not in stored:
                raise AccountingError("is in the plan and not in the source", where=name, hint=_REPORT)
            fates[name] = _fate(name, stored[name], item)
    for name, reason in source.folded().items():
        fates[name] = Fate(name, stored[name], FOLDED, (), reason)
    if missing := sorted(set(stored) - set(fates)):
        raise AccountingError(f"{len(missing)} tensors of the source have no fate", where=missing[0], hint=_REPORT)
    account = Account(tuple(fates[name] for name in stored))
    total, data = account.totals()["all"]["bytes"], source.data_bytes()
    if total != data:
        raise AccountingError(f"the tensors have {total} bytes, the files {data}", where=str(source.path), hint=_REPORT)
    return account


_REPORT = "this is a mistake of bitfold, not of yours: please report it"


def _stored_names(item: Item) -> list[str]:
    """Tensors in the files: of one that is packed already its fields."""
    packed = [d for d in item.decisions.values() if isinstance(d, Packed)]
    return [field for d in packed for field in d.stored.stored(d.tensor)] or item.target.sources


def _fate(name: str, nbytes: int, item: Item) -> Fate:
    decisions = list(item.decisions.values())
    into = tuple(item.decisions)
    if all(isinstance(d, Unused) for d in decisions):
        return Fate(name, nbytes, UNUSED, into, decisions[0].reason)
    if all(isinstance(d, Tied) for d in decisions):
        return Fate(name, nbytes, TIED, into, decisions[0].reason)
    chosen = next((d for d in decisions if isinstance(d, Quantized)), decisions[0])
    return Fate(name, nbytes, QUANTIZED if isinstance(chosen, Quantized) else KEPT, into, chosen.reason)


def check_written(plan: Plan, tensors: Iterable[TensorReport], target: Target) -> None:
    """Hold what was written against the plan.

    Args:
        plan: of the run.
        tensors: what the run reports.
        target: the output, which is read back.

    Raises:
        AccountingError: a tensor that was planned and not written, or written and not planned, or in other bytes.
    """
    written = {t.tensor: t for t in tensors}
    planned = {d.tensor: d for d in plan.written}
    if different := sorted(set(written) ^ set(planned)):
        raise AccountingError("planned and not written, or the other way round", where=different[0], hint=_REPORT)
    for name, decision in planned.items():
        if written[name].bytes_after != decision.nbytes():
            raise AccountingError("was not written in the planned size", where=name, hint=_REPORT)
    expected = {name: info.nbytes for name, info in target.stored(plan.contents()).items()}
    if expected != (held := target.held()):
        name = min(k for k in {**expected, **held} if expected.get(k) != held.get(k))
        raise AccountingError("is not in the output as it was planned", where=name, hint=_REPORT)


def rules_of(decisions: Iterable[Decision]) -> dict[str, dict[str, int]]:
    """How many tensors and bytes each reason kept, largest first."""
    count, size = Counter[str](), Counter[str]()
    for decision in decisions:
        if isinstance(decision, Kept | Unused | Packed):
            count[decision.reason] += 1
            size[decision.reason] += decision.nbytes()
    return {reason: {"tensors": count[reason], "bytes": nbytes} for reason, nbytes in size.most_common()}
