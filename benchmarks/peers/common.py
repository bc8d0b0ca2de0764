"""What every peer's script shares: its command line, its clock, its lines of output. Standard library only."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

WORKING_SET = 320 << 20  # bytes; several times the last-level cache, so that weights come from DRAM
SHAPES = [(4096, 4096), (14336, 4096)]


def arguments() -> argparse.Namespace:
    """--threads, --rows, --shapes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 8, 512])
    parser.add_argument("--shapes", nargs="*", default=[f"{n}x{k}" for n, k in SHAPES])
    found = parser.parse_args()
    found.shapes = [tuple(int(v) for v in text.split("x")) for text in found.shapes]
    return found


def copies(nbytes: int) -> int:
    """How many copies of a weight of so many bytes the caches cannot hold."""
    return max(2, WORKING_SET // nbytes)


def median_seconds(calls: Sequence[Callable[[], object]], m: int) -> float:
    """Of one call, taking the copies in turn; the first round warms up."""
    for call in calls:
        call()
    found = []
    for at in range(9 if m > 64 else 3 * len(calls)):
        start = time.perf_counter()
        calls[at % len(calls)]()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def report(kernel: str, shape: tuple[int, int], m: int, seconds: float, nbytes: float) -> None:
    """One JSON line: `nbytes` are those of the weight with its scales and zero points."""
    n, k = shape
    print(json.dumps({"kernel": kernel, "n": n, "k": k, "m": m, "us": seconds * 1e6, "nbytes": nbytes}), flush=True)


def missing(kernel: str, why: str) -> None:
    """A kernel that this build of the peer does not have."""
    print(json.dumps({"kernel": kernel, "missing": why}), flush=True)


def speeds(prefill: float, decode: float, nbytes: int) -> None:
    """One JSON line of an engine: tokens per second read and written, bytes of the model."""
    print(json.dumps({"prefill": prefill, "decode": decode, "nbytes": nbytes}), flush=True)
