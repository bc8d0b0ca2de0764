"""How much memory and disk a run will need: counted from shapes, before anything is read.

Each stage of a run is a sum of the arrays that are alive in it, in bytes. The largest stage, on top of what the process
has already, is the peak; its name is the reason that a ceiling which is too low is refused with.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from bitfold.acts import MEASURED
from bitfold.calibrated import LONGEST, Calibration, weighs_tokens
from bitfold.calibration.text import SELF
from bitfold.checkpoints import Source
from bitfold.models.sites import EMBEDDING, EXPERTS
from bitfold.pieces import WEIGHTS, in_pieces
from bitfold.plan import Decision, Item, Plan

_LIBRARIES = 60_000_000  # what PyTorch and tokenizers take when they first really work


@dataclass(frozen=True)
class Stage:
    """Something that happens in a run, and the memory that it takes beside what the process has already."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class Group:
    """Layers that are solved together: inputs k, rows n, in all."""

    name: str
    k: int
    n: int


def stages(source: Source, plan: Plan, calibration: Calibration | None, model: nn.Module | None) -> list[Stage]:
    """All stages, the largest first."""
    found = [_data_free(source, item, d) for item in plan.items for d in item.decisions.values()]
    if calibration is not None and model is not None:
        found += calibrated_stages(plan, calibration, model)
    return sorted(found, key=lambda stage: -stage.nbytes)


def peak(found: Sequence[Stage], base: int) -> int:
    """The largest stage on top of `base`."""
    return base + _LIBRARIES + (found[0].nbytes if found else 0)


def _data_free(source: Source, item: Item, decision: Decision) -> Stage:
    if decision.alias_of is not None or (decision.rule is not None and decision.rule.needs_text):
        return Stage(decision.tensor, 0)
    pieces = in_pieces(source, item, decision)
    numel, wide = decision.info.numel, decision.info.dtype.itemsize
    at_once = min(numel, WEIGHTS) if pieces else numel
    if item.target.converter is not None:  # experts that lie one by one are put together
        wide *= 2
    if decision.rule is None:
        return Stage(f"keeping {decision.tensor}", at_once * 2 * wide)
    turned = 0 if decision.rule.transform == "none" else 8
    packed = decision.nbytes() * (2 if pieces else 1)
    decoded = 4 if at_once <= 1 << 24 else 0
    return Stage(f"quantizing {decision.tensor}", at_once * (2 * wide + turned + decoded) + packed)


def groups_of(decisions: Iterable[Decision]) -> list[Group]:
    """Layers of a block that most likely share their input: one parent module, one width."""
    rows: dict[tuple[str, int], int] = defaultdict(int)
    for d in decisions:
        if d.site is not None and d.site.kind not in (EMBEDDING, EXPERTS):
            n, k = d.site.qshape
            rows[d.site.module.rpartition(".")[0], k] += n
    return [Group(name, k, n) for (name, k), n in rows.items()]


def blocks_of(plan: Plan) -> dict[str, list[Decision]]:
    """Decisions by block: `model.layers.3` of `model.layers.3.mlp.up_proj.weight`."""
    found: dict[str, list[Decision]] = defaultdict(list)
    for decision in plan.decisions:
        parts = decision.tensor.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        if numbers and decision.alias_of is None:
            found[".".join(parts[: numbers[0] + 1])].append(decision)
    return dict(found)


def calibrated_stages(plan: Plan, calibration: Calibration, model: nn.Module) -> list[Stage]:
    """Of the walk over the blocks, and of what comes before it."""
    seqlen, hidden = sequence_length(calibration, model), _hidden(model)
    found = _before(plan, calibration, model, seqlen)
    seen = set()
    for name, decisions in blocks_of(plan).items():
        wanted = [d for d in decisions if d.rule is not None and d.rule.needs_text]
        shape = tuple(sorted(d.info.shape for d in decisions))
        if not wanted or shape in seen:
            continue
        seen.add(shape)
        weights = 4 * sum(d.info.numel for d in decisions)
        widest = max([hidden, *(max(d.site.qshape[-2:]) for d in wanted if d.site is not None)])
        running = 4 * seqlen * (8 * hidden + 4 * widest)
        found.append(Stage(f"running {name}", weights + running))
        for group in groups_of(wanted):
            found.append(Stage(f"solving {group.name} ({group.k} inputs)", weights + solving(group, seqlen)))
        for d in wanted:
            if d.site is not None and d.site.kind == EXPERTS:
                experts, k = d.site.qshape[0], d.site.qshape[-1]
                statistics = 8 * k * k * experts  # of every expert at once
                found.append(Stage(f"solving {d.tensor} ({experts} experts)", weights + statistics + 16 * k * k))
    return found


def solving(group: Group, seqlen: int) -> int:
    """Bytes at the worst moment of one group, its Hessian H (k, k) and its weights W (n, k)."""
    h, w = 4 * group.k * group.k, 4 * group.n * group.k
    measuring = 2 * h + 4 * 4 * seqlen * group.k
    correcting = max(2 * h + 2 * h // 8, h + 2 * h) + 2 * w + 3 * 2 * w  # H, its double, the double correction twice
    factoring = h + 2 * h + 3 * w + h // 8
    feeding_back = h + 2 * h + 9 * w
    return max(measuring, correcting, factoring, feeding_back)


def _before(plan: Plan, calibration: Calibration, model: nn.Module, seqlen: int) -> list[Stage]:
    rows = min(calibration.nsamples * seqlen, _vocabulary(model))
    found = [Stage("embedding the text", 4 * rows * _hidden(model) + 16 * seqlen * _hidden(model))]
    fisher = weighs_tokens(plan.decisions, calibration)
    if fisher or calibration.text == SELF:
        whole = 4 * sum(d.info.numel for d in plan.decisions if d.alias_of is None)
        layers = max(1, len(blocks_of(plan)))
        # The inputs of every block, and the activations and gradients of the one that the backward pass is in.
        saved = 4 * seqlen * (layers * _hidden(model) + 5 * (14 * _hidden(model) + 4 * _widest(plan))) if fisher else 0
        logits = 3 * 4 * min(seqlen, 256) * _vocabulary(model)
        found.append(Stage("weighing tokens by gradients (--no-fisher does without)", whole + saved + logits))
    if any(d.rule is not None and d.rule.act == MEASURED for d in plan.decisions):
        inside = {d.tensor for decisions in blocks_of(plan).values() for d in decisions}
        ends = 4 * sum(d.info.numel for d in plan.decisions if d.alias_of is None and d.tensor not in inside)
        logits = 4 * 4 * min(seqlen, 256) * _vocabulary(model)
        found.append(Stage("measuring 8-bit activations (--act int8 or float does without)", ends + logits))
    return found


def _widest(plan: Plan) -> int:
    return max(
        (max(d.site.qshape[-2:]) for d in plan.decisions if d.site is not None and d.rule is not None), default=1
    )


def sequence_length(calibration: Calibration, model: Any) -> int:
    """Tokens of a sample."""
    limit = getattr(model.config, "max_position_embeddings", None) or LONGEST
    return int(calibration.seqlen or min(LONGEST, int(limit)))


def _hidden(model: Any) -> int:
    return int(getattr(model.config, "hidden_size", None) or getattr(model.config, "n_embd", None) or 1024)


def _vocabulary(model: Any) -> int:
    return int(getattr(model.config, "vocab_size", None) or 32000)


def working_disk(plan: Plan, calibration: Calibration | None, model: nn.Module | None) -> int:
    """Bytes of activations on disk at the worst moment of a calibrated run; 0 without one."""
    if calibration is None or model is None:
        return 0
    tokens = calibration.nsamples * sequence_length(calibration, model)
    widths = [
        sum(group.k for group in groups_of(d for d in decisions if d.rule is not None and d.rule.needs_text))
        for decisions in blocks_of(plan).values()
    ]
    parts = 2  # answers of the attention and of the feed-forward part
    return 4 * tokens * (max(widths, default=0) + (4 + parts) * _hidden(model))
