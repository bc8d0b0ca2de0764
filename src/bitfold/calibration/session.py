"""Calibrated quantization: block by block, each layer under the Hessian of the inputs that it will really see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitfold.calibration import BlockWalk, TuningBlock, Wanted, calibration_tokens, token_weights
from bitfold.calibration.probe import ActivationCost, Rounding
from bitfold.calibration.resume import Bookmarks
from bitfold.calibration.shared_input import Folded, SharedInput, Solved, solve_group
from bitfold.calibration.signround import tune
from bitfold.calibration.walk import HESSIANS
from bitfold.checkpoints import Source
from bitfold.errors import ModelError, UsageError, WeightError
from bitfold.kernels.activations import quantize_tokens
from bitfold.methods.hessian import ALIGNED
from bitfold.models import skeleton
from bitfold.models.opening import open_skeleton
from bitfold.models.sites import EMBEDDING, EXPERTS
from bitfold.models.swap import transform_of
from bitfold.models.vocabulary import refuse_unknown_tokens
from bitfold.nn import set_tensor
from bitfold.planning.decisions import Decision, Quantized
from bitfold.planning.plan import Plan
from bitfold.recipes.catalog import AUTO, find_method
from bitfold.system import progress
from bitfold.text.tokenizer import read_tokenizer
from bitfold.text.tokens import BUNDLED, SELF, own_text
from bitfold.text.windows import text_start

LONGEST = 2048  # tokens of a window, where nobody says otherwise
_GRADIENTS_UP_TO = 500_000_000  # parameters; gradients need the whole model and its activations in memory


@dataclass(frozen=True)
class Calibration:
    """How to calibrate.

    Args:
        text: a file of text or data, "default" (the text that comes with bitfold), "self" (the model writes it), or the
            name of a data set of the Hub; see `text.documents`.
        nsamples: windows of text.
        seqlen: tokens of a window; None = 2048, or what the model has positions for.
        drift: how far the target moves towards making up for the loss of the layers before, 0 to 1.
        fisher: weight tokens by the gradient of the loss; None = if the model is small enough to afford it.
        columns: inputs whose Hessian is kept whole; layers with more are solved in ranges of at most so many, which
            costs some accuracy and saves memory; None = whole, unless a ceiling of memory is named that needs this.
        refit: error feedback ends with the row scales that cost least under the Hessian.
        start_token: windows begin as the tokenizer begins a text.
    """

    text: str = BUNDLED
    nsamples: int = 32
    seqlen: int | None = None
    drift: float = 0.5
    fisher: bool | None = None
    columns: int | None = None
    refit: bool = True
    start_token: bool = True

    def __post_init__(self) -> None:
        if self.nsamples < 1 or (self.seqlen is not None and self.seqlen < 2):
            raise UsageError("calibration needs at least one sample of two tokens")
        if not 0 <= self.drift <= 1:
            raise UsageError(f"a drift correction of {self.drift} makes no sense", hint="0 to 1")
        if self.columns is not None and self.columns < ALIGNED:
            raise UsageError(
                f"ranges of {self.columns} inputs are too narrow", where="--columns", hint=f"at least {ALIGNED}"
            )


def settings(
    method: str | None,
    text: str | None = None,
    nsamples: int = 32,
    seqlen: int | None = None,
    drift: float | None = None,
    fisher: bool | None = None,
    columns: int | None = None,
    refit: bool = True,
    start_token: bool = True,
) -> Calibration | None:
    """The calibration that options mean: None where no text is named and the method is known to need none."""
    found = None if method is None or method == AUTO else find_method(method)
    if text is None and found is not None and not found.needs_text:
        return None
    corrects = found is None or found.corrects
    strength = (0.5 if corrects else 0.0) if drift is None else drift
    seqlen = seqlen or (found.seqlen if found is not None else None)
    weighed = fisher if corrects or fisher is not None else False
    return Calibration(text or BUNDLED, nsamples, seqlen, strength, weighed, columns, refit, start_token)


def solve_blocks(
    source: Source,
    model: nn.Module | None,
    plan: Plan,
    calibration: Calibration,
    seed: int,
    tokenizer: Path,
    bookmarks: Bookmarks | None = None,
    hessian_bytes: int = HESSIANS,
) -> Iterator[Solved | Folded | ActivationCost]:
    """Quantize every layer and stack of experts whose scheme asks for calibration, block by block.

    Layers outside the blocks and layers that never ran are not yielded: they are left to the data-free path. What 8-bit
    activations cost comes last, if a scheme leaves the choice to measurement.

    Args:
        source: the open checkpoint.
        model: its skeleton on the meta device.
        plan: what to do with each tensor.
        calibration: text and options.
        seed: of rotations, labels and text.
        tokenizer: folder of the tokenizer.
        bookmarks: where the run is noted, so that another process can go on with it.
        hessian_bytes: bytes of the Hessians of experts in memory at a time.

    Raises:
        ModelError: no model class, so nothing can be run.
    """
    model = _can_run(model, source)
    calibration = _fitting(calibration, model)
    wanted = {d.tensor: d for d in plan.quantized if _calibrated(d)}
    reader = _Reader(source, model, plan)
    found = None if bookmarks is None else bookmarks.inputs()
    ids, weights = found or _inputs(source, reader, wanted, calibration, seed, tokenizer)
    if bookmarks is not None and found is None:
        bookmarks.keep_inputs(ids, weights)
    walk = BlockWalk(model, reader, ids, weights, None if bookmarks is None else bookmarks.spill, hessian_bytes)
    walk.start()
    undecided = {d.site.module: d for d in wanted.values() if _undecided(d)}
    if undecided:
        walk.watch(lambda layer: _rounding(undecided.get(layer), seed))
    elif not compares(wanted.values(), calibration):
        walk.forget_original()
    first = 0 if bookmarks is None else bookmarks.enter(walk)
    with progress.bar("calibrate", len(walk)) as bar:
        bar.advance(first)
        for index in range(first, len(walk)):
            solved = []
            for one in _solve_block(walk, index, wanted, plan, calibration, seed):
                solved.append(one.decision.tensor)
                yield one
                del one  # it holds the weight as it was, and the next group needs the room
            if bookmarks is not None:
                bookmarks.turn(index, solved, walk)
            bar.advance(1, f"{walk.path}.{index}")
    if undecided:
        yield walk.acts(skeleton.retie)


def _solve_block(
    walk: BlockWalk, index: int, wanted: dict[str, Quantized], plan: Plan, calibration: Calibration, seed: int
) -> Iterator[Solved | Folded]:
    """Group by group; a layer that may still take factors of a later one waits; what is tuned together comes last."""
    prefix, learned = f"{walk.path}.{index}.", list[Solved]()
    takers, waiting = {f"{d.fold}.weight" for d in wanted.values()}, dict[str | None, Solved]()
    layers, stacks = _inside(prefix, wanted)
    tuned = {name: d for name, d in _tuned(prefix, wanted).items() if name in layers}
    tuner = partial(_learn, tuned, learned, seed) if tuned else None
    known = partial(_statistics_of, wanted, calibration, seed)
    for group, statistics in walk.block(index, [n for n in layers if n not in tuned], stacks, tuner, known):
        decisions = [wanted.get(f"{name}.weight") or wanted[name] for name in group]
        together = SharedInput(walk.model, decisions, statistics, *_before(decisions, plan, waiting))
        for one in solve_group(together, drift=calibration.drift, seed=seed, refit=calibration.refit):
            if isinstance(one, Solved) and one.decision.tensor in takers:
                waiting[one.decision.tensor] = one
            else:
                yield one
            del one
    yield from (*waiting.values(), *learned)


def _statistics_of(wanted: dict[str, Quantized], calibration: Calibration, seed: int, layer: str) -> Wanted:
    """What is to be known of the inputs of a layer, and of those that share them."""
    decision = wanted[f"{layer}.weight"]
    cross = calibration.drift > 0
    if not in_ranges(decision, calibration):
        return Wanted(cross)
    return Wanted(cross, calibration.columns, transform_of(decision.scheme, decision.site, seed))


def in_ranges(decision: Quantized, calibration: Calibration) -> bool:
    """Whether the inputs of a layer are more than are to be taken together."""
    site = decision.site
    layer = _calibrated(decision) and site.kind != EXPERTS and not decision.scheme.solver.tunes_blocks
    return layer and calibration.columns is not None and site.qshape[-1] > calibration.columns


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


def _can_run(model: nn.Module | None, source: Source) -> nn.Module:
    """The skeleton, if its forward pass can be run; ModelError if not."""
    if model is None:
        raise ModelError(
            "transformers does not have this model's class, so it cannot be calibrated",
            where=str(source.path),
            hint="use a data-free method (--method rtn)",
        )
    if "CausalLM" not in type(model).__name__ and "LMHead" not in type(model).__name__:
        raise ModelError(
            f"{type(model).__name__} is no causal language model, and only those can be calibrated so far",
            where=str(source.path),
            hint="use a data-free method (--method rtn)",
        )
    return model


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


def _inside(prefix: str, wanted: dict[str, Quantized]) -> tuple[list[str], list[str]]:
    """Linear layers by module and stacks of experts by tensor, of a block."""
    sites = [d.site for d in wanted.values() if d.tensor.startswith(prefix)]
    return [s.module for s in sites if s.kind != EXPERTS], [s.tensor for s in sites if s.kind == EXPERTS]


def _before(
    decisions: list[Quantized], plan: Plan, waiting: Mapping[str | None, Solved]
) -> tuple[dict[str, Decision], Solved | None]:
    """What was decided about the norm or layer that takes these layers' factors, by parameter; the layer as solved."""
    paths = {d.fold for d in decisions if d.fold is not None}
    before = {d.tensor.rpartition(".")[2]: d for d in plan.decisions if d.tensor.rpartition(".")[0] in paths}
    return before, next((waiting[f"{path}.weight"] for path in paths if f"{path}.weight" in waiting), None)


def _fitting(calibration: Calibration, model: Any) -> Calibration:
    """With windows that the model has positions for."""
    config = model.config
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or LONGEST
    if calibration.seqlen is None:
        return replace(calibration, seqlen=min(LONGEST, int(limit)))
    if calibration.seqlen > limit:
        raise UsageError(f"the model has positions for {limit} tokens, not {calibration.seqlen}", where="--seqlen")
    return calibration


def _calibrated(decision: Quantized) -> bool:
    scheme, site = decision.scheme, decision.site
    if not scheme.needs_text or site.kind == EMBEDDING:
        return False
    return site.kind != EXPERTS or not scheme.solver.tunes_blocks  # experts are not tuned, only rounded


class _Reader:
    """Tensors of the model by name, whatever tensors of the source they are made from."""

    def __init__(self, source: Source, model: nn.Module, plan: Plan) -> None:
        self._source, self.model = source, model
        self._items = {name: item.target for item in plan.items for name in item.target.names}

    def read(self, name: str) -> torch.Tensor:
        """One tensor; WeightError when it is not finite."""
        tensor = self._items[name].read(self._source.read, self.model)[name]
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WeightError("NaN or infinity among the weights", where=name, hint="the checkpoint is damaged")
        return tensor

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Some rows of a tensor, without the others where the source can do that."""
        target = self._items[name]
        some = getattr(self._source, "read_rows", None)
        if target.converter is not None or some is None:
            return self.read(name)[rows]
        part: torch.Tensor = some(target.sources[0], rows)
        return part

    def __contains__(self, name: object) -> bool:
        return name in self._items


def weighs_tokens(decisions: Iterable[Quantized], calibration: Calibration) -> bool:
    """Whether gradients are taken: as asked for, or if the weights to be calibrated are few enough to afford it."""
    if calibration.fisher is not None:
        return calibration.fisher
    return sum(d.info.numel for d in decisions if _calibrated(d)) <= _GRADIENTS_UP_TO


def _inputs(
    source: Source, reader: _Reader, wanted: dict[str, Quantized], calibration: Calibration, seed: int, tokenizer: Path
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Token ids, and token weights where they can be afforded."""
    fisher = weighs_tokens(wanted.values(), calibration)
    sizes = {"nsamples": calibration.nsamples, "seqlen": calibration.seqlen or LONGEST}
    own, known = calibration.text == SELF, read_tokenizer(tokenizer)
    start = text_start(known, calibration.start_token)
    if own:
        ids = torch.tensor(start, dtype=torch.int64)
    else:
        ids = calibration_tokens(tokenizer, calibration.text, **sizes, start_token=calibration.start_token)
    refuse_unknown_tokens(reader.model, ids, known)  # before the whole model is read
    whole = _whole(source, reader) if fisher or own else None
    if own and whole is not None:
        ids = own_text(whole, **sizes, seed=seed, start=start)
    if not fisher or whole is None:
        return ids, {}
    layers = [d.site.module for d in wanted.values() if d.site.kind != EXPERTS]
    return ids, token_weights(whole, layers, ids, seed=seed)


def _whole(source: Source, reader: _Reader) -> nn.Module:
    """The original model in float32."""
    model = open_skeleton(source, dtype=torch.float32)
    assert model is not None
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            set_tensor(model, name, reader.read(name).float())
    for name, _ in list(model.named_buffers()):
        if name in reader:
            set_tensor(model, name, reader.read(name))
    skeleton.retie(model)
    return model
