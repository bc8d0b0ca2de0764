"""How much memory and disk a run will need: counted from shapes, before anything is read.

Each stage of a run is a sum of the arrays that are alive in it, in bytes. The largest stage, on top of what the process
has already, is the peak; its name is the reason that a ceiling which is too low is refused with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from bitfold.calibration.head import head_of
from bitfold.calibration.options import Calibration
from bitfold.calibration.rehearsal import vocabulary as embedding_rows
from bitfold.calibration.runner import HESSIANS, SUMMED
from bitfold.calibration.session import weighs_tokens
from bitfold.calibration.shape import window
from bitfold.calibration.statistics import ROWS as PRODUCT_ROWS
from bitfold.calibration.statistics import WINDOWS
from bitfold.calibration.tail import tokens_at_once
from bitfold.checkpoints import Source
from bitfold.forecast.work import BlockWork, GroupShape, work_of
from bitfold.methods.gptq import WEIGHTS as CODED
from bitfold.methods.hessian import column_ranges
from bitfold.models.sites import EXPERTS
from bitfold.planning.decisions import Decision, Quantized, Tied
from bitfold.planning.plan import Item, Plan
from bitfold.planning.row_slices import WEIGHTS, in_pieces
from bitfold.qtensor import ALIGNED as ROWS
from bitfold.system.backend import fast_dtype
from bitfold.text.tokens import SELF

LIBRARIES = 60_000_000  # what PyTorch and tokenizers take when they first really work


@dataclass(frozen=True)
class Stage:
    """Something that happens in a run, and the memory that it takes beside what the process has already."""

    name: str
    nbytes: int


def stages(
    source: Source, plan: Plan, calibration: Calibration | None, model: nn.Module | None, hessian_bytes: int = HESSIANS
) -> list[Stage]:
    """All stages, the largest first; `hessian_bytes`: bytes of those of experts that are in memory at a time."""
    found = [data_free(source, item, d) for item in plan.items for d in item.decisions.values()]
    if calibration is not None and model is not None:
        found += calibrated_stages(plan, calibration, model, hessian_bytes)
    return sorted(found, key=lambda stage: -stage.nbytes)


def peak(found: Sequence[Stage], base: int) -> int:
    """The largest stage on top of `base`."""
    return base + LIBRARIES + (found[0].nbytes if found else 0)


def data_free(source: Source, item: Item, decision: Decision) -> Stage:
    """Reading and quantizing, or keeping, one tensor; nothing for what is calibrated."""
    if isinstance(decision, Tied) or (isinstance(decision, Quantized) and decision.scheme.needs_text):
        return Stage(decision.tensor, 0)
    pieces = in_pieces(source, item, decision)
    numel, wide = decision.info.numel, decision.info.dtype.itemsize
    at_once = min(numel, WEIGHTS) if pieces else numel
    if item.target.converter is not None:  # experts that lie one by one are put together
        wide *= 2
    if not isinstance(decision, Quantized):
        return Stage(f"keeping {decision.tensor}", at_once * 2 * wide)
    in_basis = 8 if decision.scheme.transform.changes_basis else 0
    packed = decision.nbytes() * (2 if pieces else 1)
    decoded = 4 if at_once <= 1 << 24 else 0
    return Stage(f"quantizing {decision.tensor}", at_once * (2 * wide + in_basis + decoded) + packed)


def _transform_kind(decision: Decision) -> str:
    return decision.scheme.transform.kind if isinstance(decision, Quantized) else ""


def calibrated_stages(plan: Plan, calibration: Calibration, model: nn.Module, hessian_bytes: int) -> list[Stage]:
    """Of the walk over the blocks, and of what comes before it."""
    seqlen, hidden, work = window(calibration.seqlen, model), _hidden(model), work_of(plan, model)
    found, seen = _before(plan, calibration, model, work), set()
    if (head := head_of(model, plan.quantized)) is not None:
        found.append(_head(head, min(calibration.nsamples * seqlen, embedding_rows(model))))
    whole = 4 * plan.numel if any(block.whole for block in work) else 0
    heard = min(hessian_bytes, sum(SUMMED * group.k**2 for block in work if block.whole for group in block.groups))
    if whole:
        logits = 2 * 4 * seqlen * embedding_rows(model)
        found.append(Stage("running the whole model", whole + heard + logits))
    for block in work:
        shape = (block.whole, *sorted((d.info.shape, _transform_kind(d)) for d in block.decisions))
        if shape in seen:
            continue
        seen.add(shape)
        weights = 4 * sum(d.info.numel for d in block.decisions) + (whole + heard if block.whole else 0)
        widest = max([hidden, *(max(d.site.qshape[-2:]) for d in block.wanted)])
        running = 4 * seqlen * (8 * hidden + 4 * widest)
        found.append(Stage(f"running {block.name}", weights + running))
        for group in block.groups:
            needed = max(measuring(group, calibration, seqlen) + running, solving(group, calibration))
            found.append(Stage(f"solving {group.name} ({_inputs(group, calibration)})", weights + needed))
        found += [
            Stage(f"solving {d.tensor} ({d.site.qshape[0]} experts)", weights + _experts(d.site.qshape, hessian_bytes))
            for d in block.wanted
            if d.site.kind == EXPERTS
        ]
    return found


def _head(decision: Quantized, tokens: int) -> Stage:
    """The weight as it is stored, its codes twice, the Hessian and what is made of it, some rows and their errors."""
    n, k = decision.site.qshape
    rows = 4 * min(n * k, WEIGHTS)
    weights = decision.info.numel * decision.info.dtype.itemsize + 2 * decision.nbytes()
    return Stage(f"solving {decision.tensor}", weights + 5 * 4 * k**2 + 5 * rows + 4 * tokens * k)


def _inputs(group: GroupShape, calibration: Calibration) -> str:
    ranges = column_ranges(group.k, calibration.columns)
    return f"{group.k} inputs" + (f" in {len(ranges)} ranges" if len(ranges) > 1 else "")


def _moments(group: GroupShape, calibration: Calibration) -> tuple[int, int]:
    """Bytes of the Hessian, and of its largest part."""
    sizes = [4 * (part.stop - part.start) ** 2 for part in column_ranges(group.k, calibration.columns)]
    return sum(sizes), max(sizes)


def _compared(group: GroupShape, calibration: Calibration) -> int:
    """Bytes of what the inputs have to do with the original model: as large as H, or as W where that is added."""
    if calibration.drift == 0:
        return 0
    h, part = _moments(group, calibration)
    return max(h, 4 * group.n * group.k) if group.layers == 1 and h == part else h


def measuring(group: GroupShape, calibration: Calibration, seqlen: int) -> int:
    """Bytes while the statistics of a group are summed in double precision: H, what it has to do with the original."""
    h, _ = _moments(group, calibration)
    c = _compared(group, calibration)
    inputs = (3 + WINDOWS) * group.k + (WINDOWS * max(group.k, group.n) if c else 0)
    return SUMMED // 4 * (h + c) + 4 * inputs * seqlen + 4 * PRODUCT_ROWS * group.k


def solving(group: GroupShape, calibration: Calibration) -> int:
    """Bytes at the worst moment of one group: its Hessian H (k, k), its weights W (n, k) and copies of some rows."""
    h, part = _moments(group, calibration)
    w, one = 4 * group.n * group.k, 4 * group.largest * group.k
    rows = 4 * min(group.n * group.k, max(ROWS * group.k, CODED))
    stacked, corrects = w * (group.layers > 1), calibration.drift > 0
    own = w if stacked or corrects or group.in_basis else 0
    # The products before the factorization; then the double copy that is factored in place, rows solved in double.
    correcting = stacked + w + max(h + _compared(group, calibration), h + 2 * part + 4 * rows) if corrects else 0
    turning = max(own + w, own + 2 * h) if group.in_basis else 0
    factoring = own + 2 * h + 2 * part  # H, the factors so far, a double copy and the factor made from it
    feeding_back = own + 2 * h + 5 * rows + w // 4 + w // 4
    judging = own + h + one * (3 if group.in_basis else 1) + 4 * min(one, CODED * 4) + w // 4
    return max(correcting, turning, factoring, feeding_back, judging)


def _experts(shape: tuple[int, ...], hessian_bytes: int) -> int:
    """Bytes for a stack (experts, n, k): some Hessians, the factorization of one, and the stack before and after."""
    experts, n, k = shape
    h = SUMMED * max(n, k) ** 2
    at_once = min(experts, max(1, hessian_bytes // h))
    return at_once * SUMMED * k * k + 3 * 4 * k * k + 3 * 4 * experts * n * k


def _before(plan: Plan, calibration: Calibration, model: nn.Module, work: Sequence[BlockWork]) -> list[Stage]:
    seqlen, words, hidden = window(calibration.seqlen, model), embedding_rows(model), _hidden(model)
    rows = min(calibration.nsamples * seqlen, words)
    found = [Stage("embedding the text", 4 * rows * hidden + 16 * seqlen * hidden)]
    fisher = weighs_tokens(plan.quantized, calibration)
    if fisher or calibration.text == SELF:
        # The inputs of every block, and the activations and gradients of the one that the backward pass is in.
        inside = 5 * (14 * hidden + 4 * _widest(plan)) * (len(work) if any(block.whole for block in work) else 1)
        saved = 4 * seqlen * (max(1, len(work)) * hidden + inside) if fisher else 0
        logits = 5 * 4 * words * tokens_at_once(words)
        what = "weighing tokens by gradients (--no-fisher does without)"
        size = 4 if calibration.text == SELF else fast_dtype().itemsize
        found.append(Stage(what, size * plan.numel + saved + logits))
    if any(d.scheme.activations.measured for d in plan.quantized):
        inner = {d.tensor for block in work for d in block.decisions}
        ends = 4 * sum(d.info.numel for d in plan.written if d.tensor not in inner)
        logits = 4 * 4 * min(seqlen, 256) * words
        found.append(Stage("measuring 8-bit activations (--act int8 or float does without)", ends + logits))
    return found


def _widest(plan: Plan) -> int:
    return max((max(d.site.qshape[-2:]) for d in plan.quantized), default=1)


def _hidden(model: Any) -> int:
    """Width of the activations between blocks."""
    text = model.config.get_text_config()
    known = (getattr(text, name, None) for name in ("hidden_size", "d_model", "n_embd"))
    return int(next((size for size in known if isinstance(size, int)), 1024))


def working_disk(plan: Plan, calibration: Calibration | None, model: nn.Module | None) -> int:
    """Bytes of activations on disk at the worst moment of a calibrated run; 0 without one."""
    if calibration is None or model is None:
        return 0
    tokens, work = calibration.nsamples * window(calibration.seqlen, model), work_of(plan, model)
    widths = [sum(group.k for group in block.groups) for block in work if not block.whole]
    parts = 2  # answers of the attention and of the feed-forward part
    return 4 * tokens * (max(widths, default=0) + (4 + parts) * _hidden(model))
