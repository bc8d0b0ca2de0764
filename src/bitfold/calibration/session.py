"""Calibrated quantization: block by block, each layer under the Hessian of the inputs that it will really see."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from bitfold.calibration.fallback import Fallback, recoverable
from bitfold.calibration.head import head_of, solve_head
from bitfold.calibration.inputs import Wish, prepare
from bitfold.calibration.options import Calibration
from bitfold.calibration.probe import ActivationCost, Rounding
from bitfold.calibration.resume import Bookmarks
from bitfold.calibration.runner import HESSIANS
from bitfold.calibration.shape import ChainShape, WalkShape, walk_shape, window
from bitfold.calibration.shared_input import Folded, SharedInput, Solved, solve_group
from bitfold.calibration.shared_walk import SharedWalk, Team, coder_of, weigh_together
from bitfold.calibration.signround import tune
from bitfold.calibration.spill import Spill
from bitfold.calibration.statistics import TuningBlock, Wanted
from bitfold.calibration.tensors import Reader, original
from bitfold.calibration.walk import BlockWalk, Text
from bitfold.calibration.whole import WHOLE, WholeWalk
from bitfold.checkpoints import Source
from bitfold.errors import ModelError, UsageError
from bitfold.kernels.activations import quantize_tokens
from bitfold.models import skeleton
from bitfold.models.sites import EMBEDDING, EXPERTS
from bitfold.models.swap import transform_of
from bitfold.planning.decisions import Decision, Quantized
from bitfold.planning.plan import Plan
from bitfold.system import memory, progress
from bitfold.system.backend import CPU

LEFT = "what is left of it is quantized without data"
_GRADIENTS_UP_TO = 500_000_000  # parameters; gradients need the whole model and its activations in memory
Outcome = Solved | Folded | ActivationCost | Fallback


@dataclass(frozen=True)
class Session:
    """A calibrated run.

    Args:
        source: the open checkpoint.
        model: its skeleton on the meta device.
        plan: what to do with each tensor.
        calibration: text and options.
        seed: of rotations, labels and text.
        max_memory: bytes that the process may take; None = a share of what is free.
        team: other processes that run windows of the text; None: this one runs all of them.
        device: where blocks run and are solved.
        kept_text: a file of the text and its weights, see `Wish`.
    """

    source: Source
    model: nn.Module | None
    plan: Plan
    calibration: Calibration
    seed: int
    max_memory: int | None = None
    team: Team | None = None
    device: torch.device = CPU
    kept_text: Path | None = None

    @property
    def shape(self) -> WalkShape:
        """How the model is walked."""
        return walk_shape(self.model)


def solve_blocks(
    session: Session, tokenizer: Path, bookmarks: Bookmarks | None = None, hessian_bytes: int = HESSIANS
) -> Iterator[Outcome]:
    """Quantize every layer and stack of experts whose scheme asks for calibration: block by block where it can be.

    Where blocks turn out not to run one by one, what is left of them is solved while the whole model runs, if there is
    room for it.

    What is not yielded (layers that never ran, and what a failure has left) is for the data-free path. What 8-bit
    activations cost comes last, if a scheme leaves the choice to measurement.

    Args:
        session: what is to be done.
        tokenizer: folder of the tokenizer.
        bookmarks: where the run is noted, so that another process can go on with it.
        hessian_bytes: bytes of the Hessians of experts in memory at a time.

    Raises:
        ModelError: the model cannot be run.
    """
    model = runnable(session.model, session.source)
    head = head_of(model, session.plan.quantized) if session.shape.chains else None
    wanted = {d.tensor: d for d in session.plan.quantized if _calibrated(d) and d is not head}
    reader = Reader(session.source, model, session.plan)
    text, failed = _text(session, reader, wanted, tokenizer, bookmarks)
    if failed is not None:
        yield failed
    for chain in session.shape.chains:
        inside = {name: d for name, d in wanted.items() if name.startswith(f"{chain.path}.")}
        last = chain is session.shape.chains[-1]
        if not inside and (head is None or not last):
            continue
        walk = _walk(session, reader, chain, text, bookmarks, hessian_bytes)
        done, room = set[str](), _room_for_whole(session)
        instead = "what is left of it is solved while the whole model runs" if room else LEFT
        behind = partial(_head, session, walk, reader, head, bookmarks) if last and head is not None else None
        outcomes = _walk_blocks(session, walk, inside, bookmarks, last, behind)
        ended = yield from _or_say(walk.name, _noting(outcomes, done), instead)
        if ended and room:
            done |= set(() if bookmarks is None else bookmarks.done)
            left = {name: d for name, d in inside.items() if name not in done}
            yield from _or_say(WHOLE, _walk_whole(session, reader, left, text, None, hessian_bytes), LEFT)
    rest = _others(session.shape, wanted)
    if rest:
        yield from _or_say(WHOLE, _walk_whole(session, reader, rest, text, bookmarks, hessian_bytes), LEFT)


def _walk(
    session: Session,
    reader: Reader,
    chain: ChainShape,
    text: Text,
    bookmarks: Bookmarks | None,
    hessian_bytes: int,
) -> BlockWalk:
    """Over one list of blocks, with the others who help, if there are any."""
    model = runnable(session.model, session.source)
    if bookmarks is None:
        return BlockWalk(model, reader, chain, text, None, hessian_bytes).on(session.device)
    folder = bookmarks.folder_of(chain.path)
    given = (model, reader, chain, text, Spill(folder), hessian_bytes)
    if session.team is None:
        return BlockWalk(*given).on(session.device)
    about = (session.calibration.columns, session.calibration.drift > 0, session.seed)
    return SharedWalk(*given).sharing(session.team, folder, bookmarks.inputs_file, about)


def _room_for_whole(session: Session) -> bool:
    """Whether the original model, in float32, has room in memory beside what is there; it runs on the CPU alone."""
    if session.device.type != "cpu":
        return False
    limit = memory.default_ceiling() if session.max_memory is None else session.max_memory
    return limit is None or 4 * session.plan.numel + (memory.resident() or 0) <= limit


def _noting(outcomes: Iterator[Outcome], done: set[str]) -> Iterator[Outcome]:
    """The same, and which tensors are done."""
    for one in outcomes:
        if isinstance(one, Solved):
            done.add(one.decision.tensor)
        yield one
        del one  # it holds the weight as it was


def runnable(model: nn.Module | None, source: Source) -> nn.Module:
    """The skeleton, if the model runs on text; ModelError if not."""
    obstacle = walk_shape(model).obstacle
    if obstacle is not None or model is None:
        raise ModelError(
            f"cannot be calibrated: {obstacle}",
            where=str(source.path),
            hint="use a data-free method (--method rtn), or leave the choice to bitfold: --bits N alone",
        )
    return model


def _or_say(name: str, outcomes: Iterator[Outcome], instead: str) -> Generator[Outcome, None, bool]:
    """The outcomes of a walk; where the walk itself fails, why it ends and what is done instead. Whether it failed."""
    try:
        yield from outcomes
    except Exception as error:  # whatever a model's own code comes up with
        yield Fallback(name, instead, recoverable(error))
        return True
    return False


def _walk_blocks(
    session: Session,
    walk: BlockWalk,
    wanted: dict[str, Quantized],
    bookmarks: Bookmarks | None,
    last: bool,
    behind: Callable[[], Iterator[Outcome]] | None,
) -> Iterator[Outcome]:
    """One list of blocks, then what follows it; of the last, 8-bit activations that are left to measurement."""
    if bookmarks is not None and bookmarks.over(walk):
        return
    walk.start()
    undecided = {d.site.module: d for d in wanted.values() if last and _undecided(d)}
    if undecided:
        walk.watch(lambda layer: _rounding(undecided.get(layer), session.seed))
    elif not compares(wanted.values(), session.calibration):
        walk.forget_original()
    first, end = _span(walk, wanted)
    walk.unchanged_before(first)
    count = len(walk) if undecided or behind is not None else end
    try:
        yield from _blocks(session, walk, wanted, bookmarks, count)
        if behind is not None:
            yield from behind()
    finally:
        walk.empty("")  # after a failure, the block at hand
    if undecided:
        yield walk.acts(skeleton.retie)
    elif bookmarks is not None:
        bookmarks.finish(walk)


def _head(
    session: Session, walk: BlockWalk, reader: Reader, head: Quantized | None, bookmarks: Bookmarks | None
) -> Iterator[Outcome]:
    """The output head, unless an earlier process has written it."""
    if head is not None and (bookmarks is None or head.tensor not in bookmarks.done):
        yield solve_head(walk, reader, head, session.seed, refit=session.calibration.refit)


def _walk_whole(
    session: Session,
    reader: Reader,
    wanted: dict[str, Quantized],
    text: Text,
    bookmarks: Bookmarks | None,
    hessian_bytes: int,
) -> Iterator[Outcome]:
    """What no list of blocks holds, while the whole model runs."""
    model = runnable(session.model, session.source)
    walk = WholeWalk(model, reader, original(session.source, reader), text, hessian_bytes)
    layers, stacks = inside("", wanted)
    walk.start(layers, list(stacks))
    yield from _blocks(session, walk, wanted, bookmarks, len(walk))


def _blocks(
    session: Session, walk: BlockWalk | WholeWalk, wanted: dict[str, Quantized], bookmarks: Bookmarks | None, count: int
) -> Iterator[Outcome]:
    """Block after block, the first `count` of them, from where an earlier process has come to."""
    first = 0 if bookmarks is None else bookmarks.enter(walk)
    with progress.bar("calibrate", count) as bar:
        bar.advance(first)
        for index in range(first, count):
            solved = []
            for one in _solve_block(session, walk, index, wanted):
                if not isinstance(one, Fallback):
                    solved.append(one.decision.tensor)
                yield one
                del one  # it holds the weight as it was, and the next group needs the room
            if bookmarks is not None:
                bookmarks.turn(index, solved, walk)
            bar.advance(1, walk.inside(index).rstrip("."))


def _span(walk: BlockWalk, wanted: dict[str, Quantized]) -> tuple[int, int]:
    """The first block in which something is to be done, and the one behind the last; 0 and 0 if there is none."""
    found = [i for i in range(len(walk)) if any(name.startswith(walk.inside(i)) for name in wanted)]
    return (found[0], found[-1] + 1) if found else (0, 0)


def _solve_block(
    session: Session, walk: BlockWalk | WholeWalk, index: int, wanted: dict[str, Quantized]
) -> Iterator[Solved | Folded | Fallback]:
    """Group by group; a layer that may still take factors of a later one waits; what is tuned together comes last."""
    prefix, learned, calibration = walk.inside(index), list[Solved](), session.calibration
    takers, waiting = {f"{d.fold}.weight" for d in wanted.values()}, dict[str | None, Solved]()
    layers, stacks = inside(prefix, wanted)
    tuned = {name: d for name, d in _tuned(prefix, wanted).items() if name in layers}
    tuner = partial(_learn, tuned, learned, session.seed) if tuned else None
    known, others = partial(_statistics_of, wanted, calibration, session.seed), [n for n in layers if n not in tuned]
    for group, statistics in walk.block(index, others, stacks, tuner, known):
        decisions = [wanted.get(f"{name}.weight") or wanted[name] for name in group]
        before = _before(decisions, session.plan, waiting)
        together = SharedInput(walk.model, decisions, statistics, *before, coder_of(walk))
        for one in solve_group(together, drift=calibration.drift, seed=session.seed, refit=calibration.refit):
            if isinstance(one, Solved) and one.decision.tensor in takers:
                waiting[one.decision.tensor] = one
            else:
                yield one
            del one
    yield from (*waiting.values(), *learned)


def _others(shape: WalkShape, wanted: dict[str, Quantized]) -> dict[str, Quantized]:
    """What is to be calibrated and is in no chain, if any of it runs at all."""
    chains = tuple(f"{chain.path}." for chain in shape.chains)
    left = {name: d for name, d in wanted.items() if not name.startswith(chains)}
    running = tuple(f"{path}." for path, _ in shape.others)
    return left if any(name.startswith(running) for name in left) else {}


def _statistics_of(wanted: dict[str, Quantized], calibration: Calibration, seed: int, layer: str) -> Wanted:
    """What is to be known of the inputs of a layer, and of those that share them."""
    decision = wanted[f"{layer}.weight"]
    if not in_ranges(decision, calibration):
        return Wanted(calibration.drift > 0)
    return Wanted(calibration.drift > 0, calibration.columns, transform_of(decision.scheme, decision.site, seed))


def in_ranges(decision: Quantized, calibration: Calibration) -> bool:
    """Whether the inputs of a layer are more than are to be taken together."""
    layer = _calibrated(decision) and decision.site.kind != EXPERTS and not decision.scheme.solver.tunes_blocks
    return layer and calibration.columns is not None and decision.site.qshape[-1] > calibration.columns


def check_ranges(decisions: Iterable[Quantized], calibration: Calibration) -> None:
    """UsageError, with the name of the tensor, when inputs are to be taken in ranges by a method that cannot."""
    wide = [d for d in decisions if in_ranges(d, calibration)]
    for d in wide:
        what = f"it has {d.site.qshape[-1]} inputs, more than the {calibration.columns} to be taken"
        if not d.scheme.takes_ranges:
            hint = "gptq and ldlq can take ranges of inputs, without pruning or factors of channels"
            raise UsageError(f"{what} together, and its method cannot take ranges", where=d.tensor, hint=hint)
        if len({other.scheme.transform for other in wide}) > 1:
            hint = "one transform for all of them"
            raise UsageError(f"{what} together, and other wide layers are in another basis", where=d.tensor, hint=hint)


def _tuned(prefix: str, wanted: dict[str, Quantized]) -> dict[str, Quantized]:
    """Layers of a block that are tuned together, by module."""
    inside = (d for d in wanted.values() if d.tensor.startswith(prefix))
    return {d.site.module: d for d in inside if d.scheme.solver.tunes_blocks}


def _learn(tuned: dict[str, Quantized], learned: list[Solved], seed: int, path: str, whole: TuningBlock) -> None:
    inside = {name.removeprefix(f"{path}."): decision for name, decision in tuned.items()}
    learned += [Solved(decision, q, w, None) for decision, q, w in tune(whole, inside, seed=seed)]


def compares(decisions: Iterable[Quantized], calibration: Calibration) -> bool:
    """Whether the activations of the original model matter, and not those of the quantized one alone."""
    return calibration.drift > 0 or any(d.scheme.solver.tunes_blocks or _undecided(d) for d in decisions)


def _undecided(decision: Quantized) -> bool:
    """Whether measurement says how its activations come."""
    return decision.scheme.activations.measured


def _rounding(decision: Quantized | None, seed: int) -> Rounding:
    """What int8 kernels do to the inputs of a layer, in the basis of its transform and back."""
    if decision is None:
        return lambda x: x
    transform = transform_of(decision.scheme, decision.site, seed)

    def rounded(x: torch.Tensor) -> torch.Tensor:
        in_basis = (x if transform is None else transform(x)).reshape(-1, x.shape[-1])
        codes, scale = quantize_tokens(in_basis)
        back = (codes * scale).to(x.dtype).view(x.shape)
        return back if transform is None else transform.inverse(back)

    return rounded


def inside(prefix: str, wanted: dict[str, Quantized]) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """Of a block: linear layers by module, and stacks of experts by tensor, with their shape (experts, n, k)."""
    sites = [d.site for d in wanted.values() if d.tensor.startswith(prefix)]
    return [s.module for s in sites if s.kind != EXPERTS], {s.tensor: s.qshape for s in sites if s.kind == EXPERTS}


def _before(
    decisions: list[Quantized], plan: Plan, waiting: Mapping[str | None, Solved]
) -> tuple[dict[str, Decision], Solved | None]:
    """What was decided about the norm or layer that takes these layers' factors, by parameter; the layer as solved."""
    paths = {d.fold for d in decisions if d.fold is not None}
    before = {d.tensor.rpartition(".")[2]: d for d in plan.decisions if d.tensor.rpartition(".")[0] in paths}
    return before, next((waiting[f"{path}.weight"] for path in paths if f"{path}.weight" in waiting), None)


def _calibrated(decision: Quantized) -> bool:
    scheme, kind = decision.scheme, decision.site.kind
    rounded = kind != EXPERTS or not scheme.solver.tunes_blocks  # experts are not tuned, only rounded
    return scheme.needs_text and kind != EMBEDDING and rounded


def weighs_tokens(decisions: Iterable[Quantized], calibration: Calibration) -> bool:
    """Whether gradients are taken: as asked for, or if the weights to be calibrated are few enough to afford it."""
    if calibration.fisher is not None:
        return calibration.fisher
    return sum(d.info.numel for d in decisions if _calibrated(d)) <= _GRADIENTS_UP_TO


def _text(
    session: Session, reader: Reader, wanted: dict[str, Quantized], tokenizer: Path, bookmarks: Bookmarks | None
) -> tuple[Text, Fallback | None]:
    """Windows of text, and token weights where they can be afforded."""
    calibration, model = session.calibration, runnable(session.model, session.source)
    weighed = tuple(d.site.module for d in wanted.values() if d.site.kind != EXPERTS)
    if session.kept_text is not None:  # other runs may want other layers
        weighed = tuple(dict.fromkeys((*session.shape.layers, *weighed)))
    fisher = weighs_tokens(wanted.values(), calibration)
    if fisher and session.device.type != "cpu":
        progress.say("tokens are weighed on the cpu: gradients of the whole model are taken nowhere else")
    seqlen = window(calibration.seqlen, model)
    wanted_text = Wish(calibration, seqlen, session.seed, weighed if fisher else (), session.kept_text)
    share = None if session.team is None else partial(weigh_together, session.team, wanted_text.weighed, session.seed)
    return prepare(wanted_text, model, partial(original, session.source, reader), tokenizer, bookmarks, share)
