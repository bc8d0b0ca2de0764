"""Tasks of EleutherAI's lm-eval, on the model that is loaded already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from bitfold.errors import CheckpointError, UsageError


def run_tasks(
    model: nn.Module, tokenizer: Any, tasks: Sequence[str], *, limit: int | None = None, batch: int = 1
) -> dict[str, dict[str, float]]:
    """Scores by task and metric, as lm-eval names them ("acc,none" becomes "acc").

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
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError("tasks need lm-eval", where="--tasks", hint="pip install 'bitfold[tasks]'") from error
    manager = TaskManager()
    unknown = [name for name in tasks if not name.endswith(".yaml") and not manager.match_tasks([name])]
    if unknown:
        hint = "`lm_eval ls tasks` lists them"
        raise UsageError(f"lm-eval has no task {', '.join(unknown)}", where="--tasks", hint=hint)
    try:
        judged = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        found = lm_eval.simple_evaluate(
            model=judged, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"lm-eval stopped: {first}", where=", ".join(tasks)) from error
    return {task: _numbers(scores) for task, scores in found["results"].items()}


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    plain = {key.removesuffix(",none"): value for key, value in scores.items()}
    return {key: float(value) for key, value in plain.items() if isinstance(value, (int, float))}
