"""Kernels against what the machine can do: reading weights (M = 1, 8) and multiplying (M = 512).

Weights lie in DRAM: each call takes the next of several copies, more than the caches hold. `read` is the bytes of the
weight (codes, scales, zero points) over the time, as a fraction of the read bandwidth; `peak` the products over the
time, as a fraction of the int8 dot products that the vector units make out of registers. Both limits are measured
again before every format, so that a neighbour on the same machine slows the limit, too. With --resident there is one
copy of a weight: what a small shape costs out of the caches, without the memory.

    python benchmarks/bench_kernels.py [--threads 2] [--formats int8 int4-g64 ...] [--rows 1 8 512] [--resident]
        [--json]
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bitfold import kernels
from bitfold.formats import get_format
from bitfold.qtensor import QTensor
from bitfold.system import native

FORMATS = ["int8", "int4", "int4-g64", "int4-asym-g64", "int3-g64", "int2-g64", "nf4", "mxfp4"]
FORMATS += [f"trellis-{bits}" for bits in (1, 2, 3, 4)]
SHAPES = [(4096, 4096), (14336, 4096)]
WORKING_SET = 320 << 20  # bytes; several times the last-level cache


def read_bandwidth(threads: int) -> float:
    """Bytes a second, the median of several passes over WORKING_SET."""
    core = native.core()
    assert core is not None, "the benchmark needs the native core"
    data = torch.ones(WORKING_SET, dtype=torch.uint8)
    return WORKING_SET / statistics.median(times(lambda: core.read_memory(data.data_ptr(), WORKING_SET, threads), 5))


def dot_peak(threads: int) -> float:
    """int8 operations a second (a product and a sum are two) of all threads at once, out of registers."""
    core, rounds = native.core(), 1 << 20
    assert core is not None
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        made = sum(pool.map(core.spin_dots, [1] * threads)) * rounds
        found = times(lambda: list(pool.map(core.spin_dots, [rounds] * threads)), 5)
    return 8 * made / statistics.median(found)


def times(f: Callable[[], Any], count: int) -> list[float]:
    f()
    found = []
    for _ in range(count):
        start = time.perf_counter()
        f()
        found.append(time.perf_counter() - start)
    return found


def random_weight(name: str, n: int, k: int) -> QTensor:
    """Random codes under scales of about one: the speed does not depend on the values."""
    format = get_format(name)
    fields = {}
    for field, info in format.layout((n, k)).items():
        if info.dtype == torch.uint8:
            fields[field] = torch.randint(0, 242 if "ternary" in name else 256, info.shape, dtype=torch.uint8)
        else:
            fields[field] = torch.rand(info.shape).add_(0.5).to(info.dtype)
    return QTensor(format, (n, k), fields)


def copies(name: str, n: int, k: int, act: str, *, resident: bool) -> list[tuple[kernels.Kernel, Any]]:
    first = random_weight(name, n, k)
    count = 1 if resident else max(2, WORKING_SET // first.nbytes)
    kernel = kernels.select(first, act)
    states = []
    for _ in range(count):
        q = QTensor(first.format, first.shape, {f: t.clone() for f, t in first.fields.items()})
        states.append((kernel, kernel.prepack(q, act)))
    return states


def bench(name: str, shape: tuple[int, int], act: str, rows: list[int], *, resident: bool) -> Iterator[dict[str, Any]]:
    n, k = shape
    states = copies(name, n, k, act, resident=resident)
    nbytes = random_weight(name, n, k).nbytes
    for m in rows:
        x = torch.randn(m, k)
        at = 0

        def step(x: torch.Tensor = x) -> None:
            nonlocal at
            kernel, state = states[at % len(states)]
            at += 1
            kernel.matmul(x, state)

        found = times(step, 9 if m > 64 else 600 if resident else 3 * len(states))
        yield {
            "format": name,
            "kernel": states[0][0].name,
            "act": act,
            "n": n,
            "k": k,
            "m": m,
            "us": statistics.median(found) * 1e6,
            "best_us": min(found) * 1e6,
            "nbytes": nbytes,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--formats", nargs="*", default=FORMATS)
    parser.add_argument("--acts", nargs="*", default=list(kernels.ACTS))
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 8, 512])
    parser.add_argument("--shapes", nargs="*", default=[f"{n}x{k}" for n, k in SHAPES])
    parser.add_argument("--resident", action="store_true", help="one copy of each weight, which stays in the caches")
    parser.add_argument("--json", action="store_true", help="one JSON object for each line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    core = native.core()
    assert core is not None
    if not args.json:
        print(f"{core.isa()}, {args.threads} threads")
        print(
            f"{'format':<16}{'act':<7}{'shape':<12}{'M':>4}{'us':>10}{'best':>10}{'GB/s':>7}{'read':>7}{'Gw/s':>7}",
            end="",
        )
        print(f"{'GOPS':>7}{'peak':>7}")
    for text in args.shapes:
        n, k = (int(v) for v in text.split("x"))
        for name in args.formats:
            limits = read_bandwidth(args.threads), dot_peak(args.threads)
            for act in args.acts:
                for row in bench(name, (n, k), act, args.rows, resident=args.resident):
                    report(row, limits, as_json=args.json)


def report(row: dict[str, Any], limits: tuple[float, float], *, as_json: bool) -> None:
    seconds = row["us"] / 1e6
    rate, weights = row["nbytes"] / seconds, row["n"] * row["k"]
    gops = 2 * weights * row["m"] / seconds / 1e9
    row |= {"read_limit": limits[0] / 1e9, "peak_gops": limits[1] / 1e9}
    row |= {"read_share": rate / limits[0], "gops": gops, "peak_share": gops / limits[1] * 1e9}
    row["gweights"] = weights / seconds / 1e9
    if as_json:
        print(json.dumps(row), flush=True)
        return
    shape = f"{row['n']}x{row['k']}"
    print(
        f"{row['format']:<16}{row['act']:<7}{shape:<12}{row['m']:>4}{row['us']:>10.0f}{row['best_us']:>10.0f}"
        f"{rate / 1e9:>7.1f}{row['read_share']:>7.0%}{row['gweights']:>7.1f}{gops:>7.0f}{row['peak_share']:>7.0%}",
        flush=True,
    )


if __name__ == "__main__":
    main()
