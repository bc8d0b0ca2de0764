"""A text that several processes read, each some neighbouring windows: the same numbers, whoever has read what.

Batches are those of one process, so every prediction is what it is there; sums over a few predictions come back, and
are added without rounding in between. A process reads its windows with the reference first, whose predictions stay on
its own disk, and then with the model that is judged: no storage is shared but that of the models.
"""

from __future__ import annotations

import gc
import pickle
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from bitfold.checkpoints.inspection import inspect
from bitfold.errors import ResourceError, UsageError
from bitfold.evaluation.reading import Portion
from bitfold.evaluation.scoring import Outcome, Scores, Setting, run_both
from bitfold.executors.protocol import Executor, Needs, Task, run_all
from bitfold.models.model_ref import ModelRef
from bitfold.system import memory
from bitfold.workspace.folder import require_same_software, software


@dataclass(frozen=True)
class _Errand:
    judged: str
    against: str | None
    setting: Setting
    version: Mapping[str, str]


def score_together(judged: ModelRef, against: ModelRef | None, setting: Setting, executor: Executor) -> Outcome:
    """See `run_both`.

    Raises:
        UsageError: a module, or an accelerator.
        ResourceError: a machine does not see a model.
    """
    paths = [_path(subject, setting) for subject in (judged, against) if subject is not None]
    if blind := executor.blind(paths):
        hint = "on storage that all machines share, under the same path"
        raise ResourceError(f"{', '.join(blind)} does not see {' and '.join(paths)}", where="--executor", hint=hint)
    largest = 4 * max(inspect(Path(path)).numel for path in paths)
    needs = Needs(executor.threads, (memory.resident() or 0) + largest)
    tasks = []
    for some in _shares(len(setting.passages), setting.batch, executor.workers):
        portion = replace(setting, passages=Portion(setting.passages, some))
        # Pickled here: tensors would be handed over in memory that a worker takes along when it ends.
        errand = pickle.dumps(_Errand(paths[0], paths[1] if against is not None else None, portion, software()))
        tasks.append(Task(f"reading windows {some.start + 1} to {some.stop}", read_portion, (errand,), needs))
    answers = {task.name: answer for task, answer in run_all(executor, tasks)}
    whole = Outcome(Scores(), None if against is None else [], None, None)
    for task in tasks:
        part: Outcome = pickle.loads(answers[task.name])
        whole.scores.follow(part.scores)
        whole.bpw = part.bpw
        if whole.lost is not None and part.lost is not None:
            whole.lost += part.lost
    return whole


def _path(subject: ModelRef, setting: Setting) -> str:
    if subject.path is None:
        raise UsageError("a module cannot be read by other processes", where=subject.name, hint="save it in a folder")
    if setting.device.type != "cpu":
        raise UsageError("other processes compute on the CPU", where="--executor", hint="leave out --device")
    return str(subject.path.absolute())


def _shares(windows: int, batch: int, workers: int) -> list[range]:
    """Neighbouring windows for each worker, whole batches, about as many for each."""
    batches = -(-windows // batch)
    count = max(1, min(workers, batches))
    ends = [min(windows, batches * i // count * batch) for i in range(count + 1)]
    return [range(ends[i], ends[i + 1]) for i in range(count)]


def read_portion(raw: bytes) -> bytes:
    """What a worker does: its windows, with both models one after the other."""
    errand: _Errand = pickle.loads(raw)
    require_same_software(errand.version)
    judged = ModelRef.of(errand.judged)
    against = None if errand.against is None else ModelRef.of(errand.against)
    with tempfile.TemporaryDirectory(prefix="bitfold-eval-") as folder:
        found = run_both(judged, against, errand.setting, Path(folder))
    found.model = None
    gc.collect()
    memory.trim()
    return pickle.dumps(found)
