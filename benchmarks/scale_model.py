"""How long quantizing takes on more processes and machines: predicted from times of its parts, and checked here.

    python benchmarks/scale_model.py measure [--times FILE]        # times of the parts of tasks, on one thread
    python benchmarks/scale_model.py predict [--times FILE]        # 8B, 70B, 405B on 1, 8, 64 machines
    python benchmarks/scale_model.py check --model FOLDER [--method trellis-3|gptq] [--ignore PATTERN]

The model of a run: work that is shared out in tasks of known size among workers that take the next one when they are
idle, a start of each worker, and what the process that was called does by itself (reads parts, adds sums, hands out
layers whose rows are coded). Times of larger shapes follow from those measured by counting operations: encoding by
weights, running by weights times tokens, products of inputs by tokens times k^2, factoring by k^3, solving by n k^2.
Times are those of the processor, so that other programs on the machine do not count; `check` takes times by the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TASK = 256 << 20  # bytes of the source in a data-free task
WINDOWS = 4  # of the text in a calibrated one
ROWS = 256  # of a layer that are coded together
MACHINE_CORES = 16


@dataclass(frozen=True)
class Shape:
    """A dense decoder: width, inner width, width of keys and values, layers, words."""

    name: str
    hidden: int
    inner: int
    kv: int
    layers: int
    words: int

    @property
    def linears(self) -> list[tuple[int, int, int]]:
        """Of a block: (outputs, inputs, group of layers with the same input)."""
        h, i = self.hidden, self.inner
        return [(h + 2 * self.kv, h, 0), (h, h, 1), (2 * i, h, 2), (h, i, 3)]

    @property
    def block(self) -> int:
        """Weights of a block."""
        return sum(n * k for n, k, _ in self.linears)

    @property
    def weights(self) -> int:
        """All weights, tables included."""
        return self.layers * self.block + 2 * self.words * self.hidden


SHAPES = (
    Shape("8B", 4096, 14336, 1024, 32, 128256),
    Shape("70B", 8192, 28672, 1024, 80, 128256),
    Shape("405B", 16384, 53248, 1024, 126, 128256),
)


@dataclass(frozen=True)
class Times:
    """Seconds on one core of the machine that was measured.

    Args:
        encode: of a weight, by a data-free trellis encoder.
        run: of a weight and a token, forward.
        product: of an entry of a Hessian and a token.
        factor: of k^3, k inputs, all that is done with a Hessian.
        solve: of n k^2, error feedback and coding.
        start: of a worker.
        take: of a byte that is put into the output, hashed and written.
        add: of an entry of a Hessian that another process has summed.
    """

    encode: float
    run: float
    product: float
    factor: float
    solve: float
    start: float
    take: float
    add: float


def makespan(tasks: Sequence[float], workers: int, start: float) -> float:
    """Seconds until all are done, each worker taking the next task when it is idle."""
    free = [start] * workers
    heapq.heapify(free)
    end = 0.0
    for task in tasks:
        at = heapq.heappop(free) + task
        end = max(end, at)
        heapq.heappush(free, at)
    return end


def data_free(shape: Shape, times: Times, workers: int, bits: int = 3) -> dict[str, float]:
    """Hours, gigabytes over the network."""
    count = max(1, -(-2 * shape.weights // TASK))
    each = shape.weights * times.encode / count
    put = shape.weights * bits / 8 * times.take
    seconds = max(makespan([each] * count, workers, times.start), put) + put / count
    moved = 2 * shape.weights + 2 * shape.weights * bits / 8
    return {"hours": seconds / 3600, "GB": moved / 1e9, "tasks": count}


def calibrated(shape: Shape, times: Times, workers: int, windows: int = 32, seqlen: int = 2048) -> dict[str, float]:
    """Hours, gigabytes over the network; GPTQ. Each worker that codes rows of a layer factors its Hessian first."""
    groups = -(-windows // WINDOWS)
    tokens = WINDOWS * seqlen
    shared = alone = moved = 0.0
    for n, k, number in shape.linears:
        before = sum(a * b for a, b, other in shape.linears if other < number)
        listen = before * tokens * times.run * (number < 3 or 1) + tokens * k * k * times.product
        shared += makespan([listen] * groups, workers, 0.0)
        pieces = -(-n // ROWS)
        coders = min(pieces, workers)
        shared += k**3 * times.factor + -(-pieces // coders) * ROWS * k * k * times.solve
        alone += groups * k * k * times.add + 4 * k * (n + k) * times.take
        moved += groups * 4 * k * k + 4 * n * k * min(workers, groups) + 4 * k * (n + coders * k)
    shared += makespan([shape.block * tokens * times.run] * groups, workers, 0.0)
    moved += windows * seqlen * shape.hidden * 4 * 2 + 2 * shape.block * min(workers, groups)
    seconds = times.start + shape.layers * (shared + alone)
    return {"hours": seconds / 3600, "GB": shape.layers * moved / 1e9, "alone": shape.layers * alone / 3600}


def table(times: Times) -> str:
    """Hours and gigabytes, a line for each model."""
    rows = [
        "| model | machines | data-free, h | moved, GB | calibrated, h | of it alone, h | moved, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        for machines in (1, 8, 64):
            workers = machines * MACHINE_CORES
            free, text = data_free(shape, times, workers), calibrated(shape, times, workers)
            cells = (
                free["hours"],
                free["GB"] * (machines > 1),
                text["hours"],
                text["alone"],
                text["GB"] * (machines > 1),
            )
            rows.append(f"| {shape.name} | {machines} | " + " | ".join(f"{cell:.3g}" for cell in cells) + " |")
    return "\n".join(rows)


def seconds_of(function: Any, least: float = 0.5) -> float:
    """Of one call, the fastest of several, on one thread."""
    function()
    best, began = float("inf"), time.process_time()
    while time.process_time() - began < least:
        at = time.process_time()
        function()
        best = min(best, time.process_time() - at)
    return best


def measured() -> Times:
    """On one thread of this machine, on shapes that take a moment."""
    import hashlib

    import torch

    from bitfold.formats import get_format
    from bitfold.methods.fits import get_fit
    from bitfold.methods.quantize import quantize_tensor
    from bitfold.methods.solvers import get_solver

    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    n = k = 1024
    w, x = torch.randn(n, k, generator=g), torch.randn(2048, k, generator=g)
    hessian, total = x.T @ x / len(x), torch.zeros(k, k, dtype=torch.float64)
    encode = seconds_of(lambda: quantize_tensor(w[:256], "trellis-3")) / (256 * k)
    run = seconds_of(lambda: x @ w.T) / (n * k * len(x))
    product = seconds_of(lambda: x.T @ x) / (k * k * len(x))
    gptq, format, fit = get_solver("gptq"), get_format("int4-g128"), get_fit("absmax")
    many, few = (seconds_of(lambda m=m: gptq(w[:m], hessian, format, fit, seed=0), 2.0) for m in (n, n // 4))
    solve = max(0.0, (many - few) / ((n - n // 4) * k * k))
    factor = (few - solve * n // 4 * k * k) / k**3
    raw = os.urandom(1 << 24)
    take = seconds_of(lambda: hashlib.sha256(raw).digest()) * 2.5 / len(raw)  # hashed twice, read and written
    add = seconds_of(lambda: total.add_(hessian)) / (k * k)
    return Times(encode, run, product, factor, solve, _start(), take, add)


def _start() -> float:
    """Seconds that a worker takes before its first task."""
    import resource

    from bitfold.executors.opening import open_executor
    from bitfold.executors.protocol import Needs, Task, run_all

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with open_executor("processes", 1) as executor:
        list(run_all(executor, [Task("loading", load_all, (), Needs())]))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def load_all() -> None:
    """What a worker imports before its first task."""
    import transformers.models.llama.modeling_llama

    import bitfold.run.parts

    assert transformers is not bitfold


class Processors:
    """Seconds of the processor that this process and each of its workers have taken while it is open (Linux)."""

    def __enter__(self) -> Processors:
        self.workers: dict[int, float] = {}
        self._began, self._open = time.process_time(), True
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        return self

    def _look(self) -> None:
        while self._open:
            for process in multiprocessing.active_children():
                with contextlib.suppress(OSError, IndexError):
                    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
                    self.workers[process.pid or 0] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self._open, self.own = False, time.process_time() - self._began
        self._watch.join()

    @property
    def path(self) -> float:
        """What would be seen on a clock if every process had a core: this one works while the others wait."""
        return self.own + max(self.workers.values(), default=0.0)


def check(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """One run here, then with one and two processes; what the model of a run says of the latter, from the former."""
    import torch

    import bitfold
    from bitfold.run.crew import _EACH as EACH

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, float] = {}
        cpu: dict[str, float] = {}
        for name, how in (("local", {}), ("1", {"workers": 1}), ("2", {"workers": 2})):
            more: dict[str, Any] = {"executor": "processes", **how} if how else {}
            events = Path(folder) / f"{name}.jsonl"
            at = time.perf_counter()
            with Processors() as taken:
                bitfold.quantize(model, Path(folder) / name, events=events, **options, **more)
            found[name], cpu[name] = time.perf_counter() - at, taken.path
        lines = [json.loads(line) for line in (Path(folder) / "local.jsonl").read_text().splitlines()]
        times = [line["time"] for line in lines if line["event"] in ("begin", "tensor")]
        works = [after - before for before, after in itertools.pairwise(times)]
        fixed, start = found["local"] - sum(works), _start()
    predicted = {}
    for workers in (1, 2):
        tasks, some = [], 0.0
        for work in works:
            if some and some + work > sum(works) / (EACH * workers):
                tasks.append(some)
                some = 0.0
            some += work
        predicted[str(workers)] = fixed + makespan([*tasks, some], workers, start)
    off = {name: predicted[name] / found[name] - 1 for name in predicted}
    speedup = {name: times["1"] / times["2"] for name, times in (("clock", found), ("processor", cpu))}
    return {"seconds": found, "processor": cpu, "predicted": predicted, "off": off, "start": start, "speedup": speedup}


def main() -> None:
    """See the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "check", "predict"))
    parser.add_argument("--model", help="folder of the model that is quantized for `check`")
    parser.add_argument("--ignore", action="append", default=[], help="tensors to keep, to make the run shorter")
    parser.add_argument("--method", default="trellis-3", help="trellis-3 (data-free) or gptq")
    parser.add_argument("--times", default="scale_times.json", help="written by measure, read by predict")
    given = parser.parse_args()
    if given.what == "measure":
        Path(given.times).write_text(json.dumps(measured().__dict__, indent=1) + "\n")
    elif given.what == "predict":
        print(table(Times(**json.loads(Path(given.times).read_text()))))
    else:
        if given.model is None:
            sys.exit("say which --model")
        free = {"format": "trellis-3", "method": "rtn", "transform": "hadamard"}
        options = free if given.method == "trellis-3" else _gptq()
        print(json.dumps(check(given.model, {**options, "ignore": given.ignore}), indent=1))


def _gptq() -> dict[str, Any]:
    from bitfold.calibration.options import settings

    return {"bits": 4, "method": "gptq", "calibration": settings("gptq", nsamples=16, seqlen=512, fisher=False)}


if __name__ == "__main__":
    main()
