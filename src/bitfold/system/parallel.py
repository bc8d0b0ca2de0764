"""Many small tensor jobs on all cores: one torch thread each, instead of all threads on each job in turn.

Operations on a few ten thousand numbers are over before an OpenMP team has gathered; run one job per core and each
core keeps its temporaries in its own cache. Results do not depend on the number of cores: jobs share nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")


def parallel_map(function: Callable[[Job], Result], jobs: Iterable[Job]) -> list[Result]:
    """[function(job) for job in jobs], in order, on as many threads as torch may use, in the caller's gradient mode."""
    items, threads = list(jobs), torch.get_num_threads()
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def run(item: Job) -> Result:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):  # both belong to the thread
            return function(item)

    if threads == 1 or len(items) < 2:
        return [function(item) for item in items]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(run, items))
    finally:
        torch.set_num_threads(threads)
