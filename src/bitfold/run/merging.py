"""Merging: base + adapter, rounded again into the formats of the base.

The sum is rounded as a model is quantized: block by block, errors fed forward under the Hessian of the text that the
adapter was trained on. What has no adapter is taken over byte for byte. A run that was killed goes on with the same
command, to the same bytes.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bitfold.calibration.fallback import Fallback
from bitfold.calibration.options import Calibration
from bitfold.calibration.resume import Bookmarks
from bitfold.calibration.session import Session, runnable, solve_blocks
from bitfold.calibration.shared_input import Solved
from bitfold.checkpoints.base import Target
from bitfold.checkpoints.manifest import carry_manifest, weights_digest
from bitfold.checkpoints.safetensors import digest_of
from bitfold.checkpoints.schema import Entry
from bitfold.checkpoints.staging import open_output
from bitfold.checkpoints.targets import FOLDER, open_target
from bitfold.errors import BitfoldError, ResourceError, UsageError
from bitfold.forecast.ceiling import MemoryChooser, MemoryUse
from bitfold.methods.fits import get_fit
from bitfold.methods.solvers import get_solver
from bitfold.models.load import load_folder
from bitfold.models.opening import open_skeleton
from bitfold.models.swap import quantize_site_tensor
from bitfold.planning.decisions import Decision
from bitfold.planning.plan import Item, Plan, make_plan
from bitfold.recipes.recipe import Recipe, Rule
from bitfold.recipes.scheme import DEFAULTS, Scheme
from bitfold.records.card import carry_card
from bitfold.records.record import carry_record, read_record
from bitfold.system import progress
from bitfold.system.team import alone
from bitfold.system.units import size_text
from bitfold.text.mixes import parts_of, without_folders
from bitfold.text.windows import text_digest
from bitfold.training.adapter_folder import CONFIG, WEIGHTS, MergedSource, read_adapter
from bitfold.training.adapters import require_peft
from bitfold.training.finetune import PART, Windows, loss_of
from bitfold.training.reading import Reading
from bitfold.training.texts import held_out_first, weighed
from bitfold.transforms import TransformSpec
from bitfold.transforms.activations import read_act
from bitfold.workspace.events import Events
from bitfold.workspace.folder import Workspace, software
from bitfold.workspace.shared import shared_work

_TOKENS = 65536  # of the text at most, that the sum is rounded under
_SHARD = 4 << 30
_SEQLEN = 512  # tokens of a window, where the adapter does not say


@dataclass(frozen=True)
class Merged:
    """What came of it.

    Args:
        base, adapter, output: names of folders.
        data: the text.
        loss_base, loss_adapter, loss_merged: mean negative log-probability over the windows held out, nats a token, of
            the base, of base and adapter, and of what was written.
        tensors: that were rounded again.
        windows, held_out, tokens: windows they were rounded under, windows held out, tokens of each.
        fallbacks: where calibration failed, what was done instead and why.
        seconds: wall-clock time.
    """

    base: str
    adapter: str
    output: str
    data: str
    loss_base: float
    loss_adapter: float
    loss_merged: float
    tensors: int
    windows: int
    held_out: int
    tokens: int
    fallbacks: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, keys as the attributes."""
        return asdict(self)

    @property
    def cost(self) -> float:
        """What rounding added to the loss of base and adapter, as a share of it."""
        return self.loss_merged / self.loss_adapter - 1


def merge(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    data: str,
    *,
    max_memory: int | None = None,
    restart: bool = False,
) -> Merged:
    """Round base + adapter into the formats of the base, and say on held-out text what that cost.

    Args:
        base: a folder that bitfold quantized.
        adapter: of `bitfold finetune`, or another LoRA adapter of PEFT's that was trained on this base.
        out: the folder to make; must not exist, or be empty.
        data: the text that it was trained on, see `Finetuning`.
        max_memory: ceiling on the resident memory while it is rounded, bytes: kept by solving wide layers in ranges of
            their inputs, or refused.
        restart: forget what an earlier run that was cut short has finished.

    Raises:
        BitfoldError: what is wrong, where, and what to do; finished work stays, and the same call goes on with it.
    """
    from bitfold.checkpoints.hub.fetch import resolve

    require_peft()
    started, local = time.monotonic(), resolve(str(base))
    source = MergedSource(local, read_adapter(adapter))
    place = open_output(out, local)
    skeleton = runnable(open_skeleton(source), source)
    said = _trained_with(local, Path(adapter), data)
    seqlen, start = int(said.get("tokens") or _SEQLEN), bool(said.get("start_token", True))
    kinds: Any = {"start_token": start, "answers_only": bool(said.get("answers_only"))}
    ids, held_out = held_out_first(local, data, skeleton, 1 << 16, seqlen, **kinds)
    ids, weights = weighed(ids, held_out, data) if kinds["answers_only"] else (ids, None)
    judged = ids[:held_out], None if weights is None else weights[:held_out]
    # Of a mix, what is learned from is so many windows of each text to within one.
    windows = max(1, min(len(ids) - held_out - (len(parts_of(data)) - 1), math.ceil(_TOKENS / ids.shape[1])))
    plan, seed = _plan(source, skeleton)
    calibration = Calibration(data, windows, ids.shape[1], start_token=start)
    use = _affordable(MemoryChooser(source, skeleton, plan, calibration), max_memory)
    calibration = use.calibration or calibration
    with shared_work(place, _identity(source, calibration, seed), alone(), restart=restart) as work:
        assert isinstance(work, Workspace)  # that of the only process
        before, together = (_loss_once(work, local, judged, path) for path in (None, Path(adapter)))
        session = Session(source, skeleton, plan, calibration, seed, max_memory)
        fallbacks = _write(session, source, work, use.hessian_bytes)
        losses = before, together, _loss(work.result, judged, None)
        names = local.name, Path(adapter).name, str(place), without_folders(data)
        counts = len(source.changed), windows, held_out, int(ids.shape[1])
        found = Merged(*names, *losses, *counts, fallbacks, time.monotonic() - started)
        carry_card(local, work.result, f"* {Path(adapter).name} merged: {_change(found)}")
        carry_record(local, work.result, {"merge": {**found.to_dict(), "output": None}})
        carry_manifest(local, work.result)
        work.publish()
    return found


def _identity(source: MergedSource, calibration: Calibration, seed: int) -> dict[str, Any]:
    """What decides the bytes of the result."""
    return {
        "base": {"name": source.path.name, "files": source.fingerprint()},
        "adapter": {name: digest_of(source.adapter.path / name) for name in (CONFIG, WEIGHTS)},
        "calibration": {**asdict(calibration), "text": text_digest(calibration.text)},
        "seed": seed,
        "version": software(),
    }


def _trained_with(base: Path, adapter: Path, data: str) -> Mapping[str, Any]:
    """How `finetune` trained it, where it did; a word of caution where that was on another text, or another base."""
    said = read_record(adapter).get(PART) or {}
    if said and said.get("data_digest") != text_digest(data):
        what = f"was trained on {said.get('data')}, and {without_folders(data)} is another text"
        warnings.warn(f"{adapter}: {what}: windows that are held out now may have been learned from", stacklevel=3)
    if said.get("base_digest") not in (None, weights_digest(base)):
        what = f"was trained on another base ({said.get('base')}): what it makes up for there is not what {base} lacks"
        warnings.warn(f"{adapter}: {what}", stacklevel=3)
    return dict(said)


def _plan(source: MergedSource, skeleton: torch.nn.Module) -> tuple[Plan, int]:
    """What is rounded again, and how; and the seed of its rotations."""
    kept = make_plan(source, skeleton, Recipe((Rule("*"),)), shorten_groups=False)
    rounded = make_plan(source, skeleton, Recipe.of("int8"), shorten_groups=True)
    sites = {d.tensor: d for d in rounded.quantized}
    rules = _recipe(source)
    seeds = {d.transform.describe().get("seed") for d in source.entries.values() if d.transform is not None} - {None}
    changed: dict[str, Decision] = {}
    for name in source.changed:
        if (entry := source.entries.get(name)) is not None and name in sites:
            scheme = _scheme(entry, rules.find(name) if rules is not None else None)
            changed[name] = replace(sites[name], scheme=scheme, fold=None, reason="has an adapter")
    items = tuple(Item(i.target, {n: changed.get(n, d) for n, d in i.decisions.items()}) for i in kept.items)
    if len(seeds) > 1:
        raise UsageError("rotations of several seeds in one folder", where=str(source.path))
    return Plan(items), int(next(iter(seeds), 0) or 0)


def _recipe(source: MergedSource) -> Recipe | None:
    """The rules that made the base, where it says and they are still understood."""
    rules = (source.quantization or {}).get("recipe")
    try:
        return Recipe(tuple(Rule(**rule) for rule in rules)) if isinstance(rules, list) else None
    except (BitfoldError, TypeError):
        return None  # the entries say the formats; a fit and a solver there are without it


def _scheme(entry: Entry, rule: Rule | None) -> Scheme:
    """Of the same format, in the same kind of basis, with error feedback where the format takes it."""
    before, ldlq = None if rule is None else rule.scheme, get_solver("ldlq")
    solver = ldlq if before is None or before.solver.tunes_blocks or not before.solver.needs_hessian else before.solver
    if solver.misfit(entry.format):
        solver = get_solver("rtn")
    fit = before.fit if before is not None else get_fit(DEFAULTS["fit"])
    kind = "none" if entry.transform is None else entry.transform.describe()["kind"]
    basis = TransformSpec("awq" if kind == "diagonal" else kind)
    return Scheme(entry.format, solver, fit, basis, read_act(entry.act))


def _affordable(chooser: MemoryChooser, limit: int | None) -> MemoryUse:
    """How it is gone about; ResourceError where a named ceiling is too low for every way."""
    use = chooser.choose(limit)
    if limit is not None and use.peak > limit:
        what = f"merging needs {size_text(use.peak)} of memory, {size_text(limit)} are allowed"
        raise ResourceError(what, where="--max-memory", hint="a higher ceiling")
    return use


def _write(session: Session, source: MergedSource, work: Workspace, hessian_bytes: int) -> list[str]:
    """The folder, but for what an earlier run has written; and where calibration failed, in words."""
    target, entries = open_target(FOLDER, work.result, _SHARD), dict(source.entries)
    wanted = {d.tensor: d for d in session.plan.quantized}
    for name, decision in wanted.items():
        entry = decision.entry(session.seed)
        assert entry is not None
        entries[name] = entry
    target.layout({name: entries.get(name) or source.content(name) for name in source.names()})
    done = _recalled(work, target)
    for one in _solved(session, source, Bookmarks(work, done, target.sync, Events(None)), hessian_bytes):
        if isinstance(one, Fallback):
            work.journal.append({"kind": "fallback", "said": f"{one.where}: {one.instead}: {one.why}"})
            continue
        name = one.decision.tensor
        hashes = target.pack(name, {**one.qtensor.fields, **one.sides})
        work.journal.append({"kind": "tensor", "tensor": name, "hashes": hashes})
        done.add(name)
    for name in source.names():
        if name in entries and name not in done:
            target.pack(name, source.fields(name))
        elif name not in entries:
            target.write(name, [source.read(name)])
    source.copy_side_files(work.result)
    tensors = {name: entry.to_dict() for name, entry in entries.items()}
    target.finish(
        source.config, {**(source.quantization or {}), "tensors": tensors, "merged": source.adapter.path.name}
    )
    return [str(record["said"]) for record in work.journal.of_kind("fallback")]


def _recalled(work: Workspace, target: Target) -> set[str]:
    """Tensors that an earlier run has rounded again, as far as their hashes agree."""
    records = {record["tensor"]: record["hashes"] for record in work.journal.of_kind("tensor")}
    found = {name for name, hashes in records.items() if all(target.digest(n) == sha for n, sha in hashes.items())}
    if found:
        progress.say(f"going on: {len(found)} tensors are done")
    return found


def _solved(
    session: Session, source: MergedSource, marks: Bookmarks, hessian_bytes: int
) -> Iterator[Solved | Fallback]:
    """Everything that is rounded again; without data what calibration has left."""
    for one in solve_blocks(session, source.path, marks, hessian_bytes):
        if isinstance(one, Solved | Fallback):
            yield one
    for name, decision in ((d.tensor, d) for d in session.plan.quantized if d.tensor not in marks.done):
        w = source.read(name)
        yield Solved(decision, quantize_site_tensor(w, decision.site, decision.scheme, session.seed), w, None)


def _loss_once(work: Workspace, folder: Path, windows: Windows, adapter: Path | None) -> float:
    """`_loss`, unless an earlier run has it."""
    of = "base" if adapter is None else "adapter"
    known = {record["of"]: float(record["loss"]) for record in work.journal.of_kind("loss")}
    if of not in known:
        known[of] = _loss(folder, windows, adapter)
        work.journal.append({"kind": "loss", "of": of, "loss": known[of]})
    return known[of]


def _loss(folder: Path, windows: Windows, adapter: Path | None) -> float:
    """Mean loss of windows, in float32."""
    model: Any = load_folder(folder, dtype=torch.float32)
    if adapter is not None:
        model = require_peft().PeftModel.from_pretrained(model, str(adapter)).base_model.model.eval()
    reading = Reading(model)
    what = "base" if adapter is None else "base and adapter"
    ids, weights = windows
    with progress.bar(f"held-out loss of {what}", len(ids)) as bar:
        total = 0.0
        for number, window in enumerate(ids):
            total += loss_of(reading, window, None if weights is None else weights[number])
            bar.advance(1)
    return total / len(ids)


def _change(found: Merged) -> str:
    losses = f"{found.loss_base:.4f} base, {found.loss_adapter:.4f} with the adapter, {found.loss_merged:.4f} merged"
    return f"held-out loss {losses} ({100 * found.cost:+.2f} %)"


def say_what_came_of_it(found: Merged) -> str:
    """In a line or two."""
    lines = [f"{found.output}: {_change(found)}, in {progress.duration(found.seconds)}"]
    return "\n".join([*lines, *(f"  {text}" for text in found.fallbacks)])
