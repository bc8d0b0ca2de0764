"""Tasks of EleutherAI's lm-eval, on the model that is loaded already."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bitfold.errors import CheckpointError, UsageError

_DOCUMENTS = "sample_len"  # what lm-eval calls their number


def check_tasks(tasks: Sequence[str]) -> Any:
    """lm-eval's task manager, once it is clear that it knows all of these; to be asked before hours of work.

    Args:
        tasks: names of lm-eval tasks, or paths of task files (.yaml).

    Raises:
        UsageError: lm-eval is not installed, or does not know a task.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UsageError("tasks need lm-eval", where="--tasks", hint="pip install 'bitfold[tasks]'") from error
    if missing := [name for name in tasks if name.endswith(".yaml") and not Path(name).is_file()]:
        raise UsageError("no such task file", where=missing[0])
    manager = _manager()
    unknown = [name for name in tasks if not name.endswith(".yaml") and not manager.match_tasks([name])]
    if unknown:
        hint = "`lm_eval ls tasks` lists them; a file of your own ends in .yaml"
        raise UsageError(f"lm-eval has no task {', '.join(unknown)}", where="--tasks", hint=hint)
    return manager


@functools.cache
def _manager() -> Any:
    """Made once: it reads a few thousand files."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about what is meant here
    return TaskManager()


def run_tasks(
    model: nn.Module, tokenizer: Any, tasks: Sequence[str], *, limit: int | None = None, batch: int = 1
) -> dict[str, dict[str, float]]:
    """Scores by task and metric, as lm-eval names them ("acc,none" becomes "acc"); "documents" is how many there were.

    Args:
        model: a causal language model of transformers, quantized or not.
        tokenizer: its own.
        tasks: names of lm-eval tasks, or paths of task files (.yaml).
        limit: documents of each task; None: all.
        batch: documents at once.

    Raises:
        UsageError: lm-eval is not installed, or does not know a task.
        CheckpointError: a task's data cannot be fetched.
    """
    manager = check_tasks(tasks)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    try:
        judged = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        found = lm_eval.simple_evaluate(
            model=judged, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False
        )
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"lm-eval stopped: {first}", where=", ".join(tasks)) from error
    return {task: _numbers(scores) for task, scores in found["results"].items()}


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    plain = {key.removesuffix(",none"): value for key, value in scores.items() if key != _DOCUMENTS}
    numbers = {key: float(value) for key, value in plain.items() if isinstance(value, (int, float))}
    return {**numbers, "documents": float(scores[_DOCUMENTS])} if _DOCUMENTS in scores else numbers
