"""Packing against a memcpy of the larger side, and against what one would write without it.

Medians of several runs; `ratio` is the time over that of copying the codes (one byte each) once, into memory already
there, with the same number of threads; pack and unpack allocate what they return. The obvious Python loop is measured
on fewer codes and scaled up.

    python benchmarks/bench_packing.py [--codes 67108864] [--threads 1]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bitfold.formats.packing import pack, unpack
from bitfold.system import native


def median(f: Callable[[], Any], seconds: float = 0.5) -> float:
    """Median seconds of a call, over at least 5 calls."""
    f()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < seconds and len(times) < 500):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def python_loop(codes: list[int], bits: int) -> bytes:
    out = bytearray((len(codes) * bits + 7) // 8)
    at = 0
    for code in codes:
        for bit in range(bits):
            out[at >> 3] |= (code >> bit & 1) << (at & 7)
            at += 1
    return bytes(out)


def numpy_packbits(codes: np.ndarray, bits: int) -> np.ndarray:
    spread = np.unpackbits(codes[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(spread, bitorder="little")


def without_native(f: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        os.environ["BITFOLD_NATIVE"] = "0"
        try:
            return f()
        finally:
            del os.environ["BITFOLD_NATIVE"]

    return call


def measure(count: int, bits: int) -> list[tuple[str, float]]:
    codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8)
    packed, copy = pack(codes, bits), torch.empty_like(codes)
    few = codes[: min(count, 1 << 15)].tolist()
    rows = [("memcpy of the codes", median(lambda: copy.copy_(codes)))]
    rows.append(("memcpy to new memory", median(lambda: codes.clone())))
    if native.core() is not None:
        rows.append(("pack", median(lambda: pack(codes, bits))))
        rows.append(("unpack", median(lambda: unpack(packed, bits, count))))
    rows.append(("pack, PyTorch", median(without_native(lambda: pack(codes, bits)), 0.2)))
    rows.append(("unpack, PyTorch", median(without_native(lambda: unpack(packed, bits, count)), 0.2)))
    part = codes[: min(count, 1 << 22)].numpy()
    rows.append(("pack, numpy.packbits", median(lambda: numpy_packbits(part, bits), 0.2) * count / len(part)))
    rows.append(("pack, Python loop", median(lambda: python_loop(few, bits), 0.1) * count / len(few)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=1 << 26)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bits", type=int, nargs="*", default=list(range(1, 9)))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    core = native.core()
    print(f"{args.codes} codes, {args.threads} threads, native core: {core.isa() if core else 'none'}")
    print(f"{'bits':>4}  {'what':<22}{'ms':>12}{'ratio':>10}")
    for bits in args.bits:
        rows = measure(args.codes, bits)
        for what, seconds in rows:
            print(f"{bits:>4}  {what:<22}{seconds * 1e3:>12.2f}{seconds / rows[0][1]:>10.2f}")


if __name__ == "__main__":
    main()
