"""Rows of layers that other processes code: who calls writes weights and statistics into a file, each of the others
takes some pieces of the rows (see `coding`), and answers with the codes and their hash.

Everyone factors the Hessian for himself: it takes no longer than waiting for another one's factor.
"""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bitfold.calibration.coding import Coded, Coding, code
from bitfold.calibration.fallback import recoverable
from bitfold.calibration.statistics import Statistics
from bitfold.checkpoints.safetensors import digest_of
from bitfold.checkpoints.shards import save_tensors
from bitfold.errors import CheckpointError
from bitfold.executors.protocol import Executor, Needs, Task, run_all
from bitfold.methods.gptq import row_pieces
from bitfold.methods.hessian import BlockDiagonal, Moments, diagonal_blocks
from bitfold.models.swap import transform_of
from bitfold.qtensor import QTensor
from bitfold.system.memory import Ceiling
from bitfold.transforms import Diagonal

_counter = itertools.count()
_WEIGHTS, _FACTORS, _DEFICIT, _APART, _LOSSES, _FIELD = "weights", "factors", "deficit", "apart", "losses", "field."


@dataclass(frozen=True)
class Rows:
    """Some rows to be coded.

    Args:
        opening: opens the run.
        limit: ceiling on the memory of the process, bytes; None = none.
        file: of the weights and statistics.
        names: of the tensors, all of one scheme.
        rows: first one, and the one after the last.
        numbers: tokens that were seen, whether the statistics are in the basis, seed, whether row scales are refitted.
        drift: strength of the drift correction.
    """

    opening: Callable[[], Any]
    limit: int | None
    file: str
    names: tuple[str, ...]
    rows: tuple[int, int]
    numbers: tuple[int, bool, int, bool]
    drift: float


@dataclass(frozen=True)
class Answer:
    """A file of codes, its SHA-256, and what went otherwise than it should."""

    file: str
    digest: str
    flags: tuple[str, ...]


def shared_out(coding: Coding, whole: torch.Tensor) -> list[slice]:
    """The pieces that processes can take; none where rows belong together."""
    scheme, known = coding.scheme, coding.statistics
    apart = scheme.solver.feeds_errors and scheme.sparsity is None and coding.stacked
    if known is None or coding.blind or not apart:
        return []
    pieces = row_pieces(scheme.format, whole)
    return pieces if len(pieces) > 1 else []


def code_together(
    coding: Coding,
    whole: torch.Tensor,
    team: tuple[Executor, Callable[[], Any], Needs, int | None],
    folder: Path,
) -> Coded:
    """See `coding.code`; `team`: the executor, what opens the run there, needs and ceiling of each."""
    executor, opening, needs, limit = team
    known, pieces = coding.statistics, shared_out(coding, whole)
    assert known is not None
    file = _aside(folder, "coding")
    save_tensors({_WEIGHTS: whole, **_statistics(known), **_factors(coding)}, file)
    numbers = (known.tokens, known.in_basis, coding.seed, coding.refit)
    tasks = [
        Task(
            f"coding rows {first} to {stop - 1} of {', '.join(coding.names)}",
            code_rows,
            (Rows(opening, limit, str(file), coding.names, (first, stop), numbers, coding.drift),),
            needs,
        )
        for first, stop in cut(pieces, executor.workers)
    ]
    answers = {task.name: answer for task, answer in run_all(executor, tasks)}
    found = []
    for task in tasks:
        if isinstance(answer := answers[task.name], Exception):
            raise answer
        found.append(_read(answer))
    file.unlink()
    names = [name for name in found[0] if name.startswith(_FIELD)]
    joined = {name: torch.cat([some[name] for some in found]) for name in (*names, _APART, _LOSSES)}
    fields = {name.removeprefix(_FIELD): joined[name] for name in names}
    flags = tuple(dict.fromkeys(flag for task in tasks for flag in answers[task.name].flags))
    q = QTensor(coding.scheme.format, tuple(whole.shape), fields)
    return Coded([q], flags, joined[_APART], joined[_LOSSES])


def _aside(folder: Path, kind: str) -> Path:
    """A new file, of a name that no other process gives, and none gave before: a node might still know its content."""
    return folder / f"{kind}-{platform.node()}-{os.getpid()}-{next(_counter)}.part"


def cut(pieces: list[slice], workers: int) -> list[tuple[int, int]]:
    """First row and the one after the last of what each takes: neighbours together, as many for each as can be."""
    count = min(len(pieces), max(1, workers))
    ends = [len(pieces) * i // count for i in range(count + 1)]
    return [(pieces[a].start, pieces[b - 1].stop) for a, b in itertools.pairwise(ends)]


def _statistics(known: Statistics) -> dict[str, torch.Tensor]:
    kinds = {"hessian": known.hessian, **({} if known.cross is None else {"cross": known.cross})}
    found = {f"{kind}.{i}": m for kind, some in kinds.items() for i, (_, m) in enumerate(diagonal_blocks(some))}
    return found if known.deficit is None else {**found, _DEFICIT: known.deficit}


def _factors(coding: Coding) -> dict[str, torch.Tensor]:
    factors = coding.transform.scale if isinstance(coding.transform, Diagonal) else None
    return {} if factors is None else {_FACTORS: factors}


def _read(answer: Answer) -> dict[str, torch.Tensor]:
    path = Path(answer.file)
    if digest_of(path) != answer.digest:
        hint = "the same command makes it again"
        raise CheckpointError("codes of another process are not as they were written", where=str(path), hint=hint)
    found = load_file(path)
    path.unlink()
    return found


@torch.no_grad()
def code_rows(task: Rows) -> Answer | Exception:
    """Code them; or what went wrong, which who called may do without."""
    run, ceiling = task.opening(), Ceiling(task.limit)
    decision = next(d for d in run.plan.quantized if d.tensor == task.names[0])
    tokens, in_basis, seed, refit = task.numbers
    with safe_open(task.file, "pt") as file:
        w = file.get_slice(_WEIGHTS)[task.rows[0] : task.rows[1]]
        keys = set(file.keys())
        hessian, cross = (_moments(file, keys, kind) for kind in ("hessian", "cross"))
        deficit = file.get_slice(_DEFICIT)[task.rows[0] : task.rows[1]] if _DEFICIT in keys else None
        transform = transform_of(decision.scheme, decision.site, seed)
        if _FACTORS in keys:
            transform = Diagonal(w.shape[1], file.get_tensor(_FACTORS))
    assert hessian is not None
    known = Statistics(hessian, cross, tokens, in_basis=in_basis, deficit=deficit)
    shapes = ((len(w), w.shape[1]),)
    coding = Coding(
        decision.scheme, (", ".join(task.names),), shapes, transform, known, False, task.drift, seed, refit, True
    )
    try:
        coded = code(coding, w)
    except Exception as error:
        return recoverable(error)
    assert coded.losses is not None
    path = _aside(Path(task.file).parent, "coded")
    fields = {f"{_FIELD}{name}": value for name, value in coded.qs[0].fields.items()}
    save_tensors({**fields, _APART: coded.apart, _LOSSES: coded.losses}, path)
    ceiling.check()
    return Answer(str(path), digest_of(path), coded.flags)


def _moments(file: Any, keys: set[str], kind: str) -> Moments | None:
    parts = tuple(file.get_tensor(f"{kind}.{i}") for i in range(len(keys)) if f"{kind}.{i}" in keys)
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else BlockDiagonal(parts)
