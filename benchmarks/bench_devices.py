"""Products of packed weights and decoded text on an accelerator: microseconds, and the share of its bandwidth.

    python benchmarks/bench_devices.py                          products alone, 4096 x 4096 and 14336 x 4096
    python benchmarks/bench_devices.py --model FOLDER           tokens a second of a quantized folder as well
    python benchmarks/bench_devices.py --device xpu

The bandwidth is that of a copy in the same run. "fused" is the kernel in Triton, "plain" the route of decoded tiles;
both are checked against the CPU's decoded weight before they are timed. Without an accelerator it says so, and ends.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

from bitfold import QTensor, quantize_tensor
from bitfold.kernels import fused
from bitfold.kernels.base import Kernel
from bitfold.kernels.reference import reference
from bitfold.system import backend

FORMATS = ("int4-g64", "int4-asym-g64", "int8", "int3", "int2-g64", "nf4", "trellis-2", "trellis-3", "trellis-4")
SHAPES = ((4096, 4096), (14336, 4096))
ROWS = (1, 4, 16)
TIMES = 30


def seconds(device: torch.device, run: Callable[[], object]) -> float:
    """Median of some runs, each until the device is done."""
    wait = getattr(torch, device.type).synchronize
    found = []
    for _ in range(TIMES + 5):
        wait()
        start = time.perf_counter()
        run()
        wait()
        found.append(time.perf_counter() - start)
    return statistics.median(found[5:])


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.zeros(1 << 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(device, lambda: target.copy_(source))


def products(device: torch.device) -> None:
    """A line for each format, shape, number of rows and route."""
    most = bandwidth(device)
    print(f"{backend.describe(device)}, a copy: {most / 1e9:.0f} GB/s")
    print(f"{'format':14} {'shape':14} rows route {'us':>9} {'GB/s':>7} share  error")
    for n, k in SHAPES:
        w = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
        for name in FORMATS:
            q = quantize_tensor(w, name)
            exact = q.dequantize().double()
            there = q.to(device)
            routes = {"plain": reference, **({"fused": fused.triton} if fused.accepts(there, "float") else {})}
            for rows in ROWS:
                line(there, exact, rows, routes, most)


def line(q: QTensor, exact: torch.Tensor, rows: int, routes: dict[str, Kernel], most: float) -> None:
    """One format, shape and number of rows."""
    device = next(iter(q.fields.values())).device
    x = torch.randn(rows, q.shape[1], generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    there, law = x.to(device), x.double() @ exact.T
    for route, kernel in routes.items():
        state = kernel.prepack(q, "float")
        error = float((kernel.matmul(there, state).cpu().double() - law).abs().max() / law.abs().max())
        if error > 0.02:  # the plain route rounds weights to 16 bits
            sys.exit(
                f"{q.format.name}, {rows} rows, {route}: the product is wrong by {error:.1%} of its largest number"
            )
        took = seconds(device, lambda kernel=kernel, state=state: kernel.matmul(there, state))
        rate = q.nbytes / took
        shape = "x".join(map(str, q.shape))
        speed = f"{took * 1e6:9.1f} {rate / 1e9:7.1f} {rate / most:5.0%}"
        print(f"{q.format.name:14} {shape:14} {rows:4} {route:5} {speed} {error:.1e}")


def text(device: torch.device, model: str) -> None:
    """Tokens a second of a model, and the bytes of its weights times them as a share of the bandwidth."""
    from bitfold.engine import Sampling, Writer
    from bitfold.engine.opening import held_bytes

    writer = Writer.open(model, device=device)
    held = held_bytes(writer.model)
    writer.write("Once upon a time", Sampling(16))  # compiles what is compiled
    found = writer.write("Once upon a time", Sampling(128))
    rate = found.tokens_per_second or 0.0
    print(
        f"{model}: {rate:.1f} tokens/s, {held / 1e9:.2f} GB of weights: {rate * held / bandwidth(device):.0%} of a copy"
    )


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=backend.DEVICES)
    parser.add_argument("--model", help="a quantized folder to write with")
    asked = parser.parse_args()
    device = backend.find_device(asked.device)
    if device.type == "cpu":
        sys.exit(
            f"no accelerator: PyTorch {torch.__version__} sees {', '.join(backend.present())}; see `make bench` for it"
        )
    products(device)
    if asked.model:
        text(device, asked.model)


if __name__ == "__main__":
    main()
