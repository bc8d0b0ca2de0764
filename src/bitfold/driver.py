"""The driver: a checkpoint in, a quantized folder out, one tensor in memory at a time.

Plan first (names, shapes and rules only), then read, quantize and write tensor by tensor. Everything is written aside,
under a name that no loader looks at, and renamed when it is complete.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitfold import progress
from bitfold.card import write_card
from bitfold.checkpoints import Source, open_source
from bitfold.checkpoints.native import QUANT_METHOD, VERSION
from bitfold.checkpoints.safetensors import ShardWriter, write_json
from bitfold.errors import CheckpointError, UsageError
from bitfold.models import skeleton
from bitfold.models.swap import is_plain, quantize_site_tensor
from bitfold.plan import Item, Plan, make_plan
from bitfold.recipe import Recipe, Rule
from bitfold.report import QuantizeReport, TensorReport, peak_memory, relative_error

OnTensor = Callable[[TensorReport], None]
DEFAULT_GROUP = 64


def choose_recipe(
    *,
    bits: int | None = None,
    format: str | None = None,
    group_size: int | None = None,
    fit: str | None = None,
    solver: str = "rtn",
    act: str = "float",
    ignore: Iterable[str] = (),
    recipe: Recipe | str | Path | None = None,
) -> Recipe:
    """The recipe that a set of options means.

    Args:
        bits: 1..8: integers; 8 with one scale a row, 2 to 7 with scale and zero point for each group of 64, 1 with
            a scale for each group of 64.
        format: a format name instead of bits.
        group_size: weights that share a scale; -1 or 0 = one scale a row.
        fit: see FITS; default "mse".
        solver: see SOLVERS.
        act: "float" or "int8".
        ignore: patterns of tensors to keep.
        recipe: a Recipe or a TOML file instead of all but `ignore`.

    Raises:
        UsageError: options that contradict each other, or none at all.
    """
    if recipe is not None:
        if bits is not None or format is not None or group_size is not None or fit is not None:
            raise UsageError(
                "a recipe already says formats and fits", hint="drop --bits, --format, --group-size, --fit"
            )
        loaded = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        return loaded.ignoring(ignore)
    if (bits is None) == (format is None):
        raise UsageError("choose one of bits and format", hint="for example --bits 4 or --format nf4")
    name = format if format is not None else _format_for_bits(bits)
    if group_size is not None:
        name = _with_group(name, group_size)
    return Recipe.of(name, fit=fit or "mse", solver=solver, act=act).ignoring(ignore)


def _format_for_bits(bits: int | None) -> str:
    if bits is None or not 1 <= bits <= 8:
        raise UsageError(f"cannot quantize to {bits} bits", hint="1 to 8")
    if bits == 8:
        return "int8"
    # One bit has two levels: they sit on both sides of zero, which needs no zero point.
    return f"int{bits}-g{DEFAULT_GROUP}" if bits == 1 else f"int{bits}-asym-g{DEFAULT_GROUP}"


def _with_group(name: str, group_size: int) -> str:
    from bitfold.formats import get_format

    if group_size < -1:
        raise UsageError(f"a group of {group_size} weights makes no sense", hint="a positive number, or -1 for the row")
    double = name.endswith("-dq")
    parts = [p for p in name.removesuffix("-dq").split("-") if p not in ("row", "tensor") and not _is_group(p)]
    scoped = "-".join([*parts, f"g{group_size}" if group_size > 0 else "row"]) + ("-dq" if double else "")
    get_format(scoped)
    return scoped


def _is_group(part: str) -> bool:
    return part.startswith("g") and part[1:].isdigit()


def quantize(
    src: str | Path,
    out: str | Path,
    *,
    bits: int | None = None,
    format: str | None = None,
    group_size: int | None = None,
    fit: str | None = None,
    solver: str = "rtn",
    act: str = "float",
    ignore: Iterable[str] = (),
    recipe: Recipe | str | Path | None = None,
    dry_run: bool = False,
    seed: int = 0,
    revision: str | None = None,
    token: str | None = None,
    upload_repo: str | None = None,
    max_shard_bytes: int = 4 << 30,
    on_tensor: OnTensor | None = None,
) -> QuantizeReport:
    """Quantize a checkpoint into a new folder, streaming tensor by tensor.

    Args:
        src: a local Hugging Face folder, a GGUF file, or a Hub id.
        out: the folder to make; must not exist, or be empty.
        bits, format, group_size, fit, solver, act, ignore, recipe: see `choose_recipe`.
        dry_run: plan and report only; write nothing.
        seed: for solvers that draw random numbers.
        revision, token: of the Hub repository.
        upload_repo: push the finished folder there.
        max_shard_bytes: size at which a new shard is begun.
        on_tensor: called with the report of each tensor as it is written.

    Raises:
        BitfoldError: what is wrong, where, and what to do; nothing that looks whole is left behind.
    """
    started = time.perf_counter()
    rules = choose_recipe(
        bits=bits, format=format, group_size=group_size, fit=fit, solver=solver, act=act, ignore=ignore, recipe=recipe
    )
    target = Path(out)
    if not dry_run:
        refuse_existing(target)
    from bitfold.checkpoints.hub import check_login, resolve, upload

    if upload_repo is not None and not dry_run:
        check_login(token)  # before the work, not after it
    source = open_source(resolve(str(src), revision=revision, token=token))
    try:
        model = _open_model(source)
        plan = make_plan(source, model, rules, shorten_groups=bits is not None and group_size is None)
        report = QuantizeReport.of_plan(plan, str(src), None if dry_run else str(target), rules)
        if not dry_run:
            _write(source, model, plan, target, report, seed, max_shard_bytes, on_tensor)
    finally:
        source.close()
    report.seconds, report.peak_memory = time.perf_counter() - started, peak_memory()
    if upload_repo is not None and not dry_run:
        report.url = upload(target, upload_repo, token=token)
    return report


def _open_model(source: Source) -> nn.Module | None:
    """The skeleton that says what each tensor is; a checkpoint that is quantized already is refused."""
    method = (source.config.get("quantization_config") or {}).get("quant_method")
    if method is not None or hasattr(source, "quantization"):
        raise CheckpointError(
            f"is quantized already ({method or QUANT_METHOD})",
            where=str(source.path),
            hint="quantize the original; quantizing twice loses twice",
        )
    return skeleton.of_config(source.config, str(source.path))


def refuse_existing(out: Path) -> None:
    """CheckpointError when the output exists and is not an empty folder."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise CheckpointError("exists already", where=str(out), hint="choose another output folder, or remove it")


def _write(
    source: Source,
    model: nn.Module | None,
    plan: Plan,
    out: Path,
    report: QuantizeReport,
    seed: int,
    max_shard_bytes: int,
    on_tensor: OnTensor | None,
) -> None:
    partial = out.with_name(f".{out.name}.partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"cannot be made: {error}", where=str(partial)) from error
    try:
        writer = ShardWriter(partial, max_shard_bytes)
        with progress.bar("quantize", plan.numel) as bar:
            for item in plan.items:
                for done in _write_item(source, model, item, writer, seed):
                    report.add(done)
                    bar.advance(done.numel, done.tensor)
                    if on_tensor is not None:
                        on_tensor(done)
        report.files = writer.close()
        source.copy_side_files(partial)
        config = skeleton.with_dtype(source.config, (source.info(name).dtype for name in source.names()))
        write_json(partial / "config.json", {**config, "quantization_config": _config(plan, report)})
        write_card(partial, report)
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_item(
    source: Source, model: nn.Module | None, item: Item, writer: ShardWriter, seed: int
) -> Iterable[TensorReport]:
    tensors = item.target.read(source.read, model)
    for name in list(tensors):
        w = tensors.pop(name)
        decision = item.decisions[name]
        if decision.alias_of is not None:
            continue
        if decision.rule is None or decision.site is None:
            writer.add(name, w)
            yield decision.report(w.numel() * w.element_size())
            continue
        yield _write_quantized(writer, name, w, decision.rule, decision, seed)


def _write_quantized(
    writer: ShardWriter, name: str, w: torch.Tensor, rule: Rule, decision: Any, seed: int
) -> TensorReport:
    q = quantize_site_tensor(w, decision.site, rule, seed)
    oriented = w.transpose(-1, -2) if decision.site.transposed else w
    if is_plain(q.format):
        values = q.fields["values"]
        writer.add(name, values.transpose(-1, -2) if decision.site.transposed else values)
    else:
        for field, tensor in q.fields.items():
            writer.add(f"{name}.{field}", tensor)
    report: TensorReport = decision.report(q.nbytes, error=relative_error(oriented, q))
    return report


def _config(plan: Plan, report: QuantizeReport) -> dict[str, Any]:
    from bitfold import __version__

    entries = plan.entries()
    return {
        "quant_method": QUANT_METHOD,
        "version": VERSION,
        "bitfold": __version__,
        "formats": {e.format.name: e.format.describe() for e in entries.values()},
        "tensors": {name: entry.to_dict() for name, entry in entries.items()},
        "kept": {t.tensor: t.reason for t in report.tensors if t.format is None},
        "unused": plan.unused(),
        "recipe": report.recipe,
    }
