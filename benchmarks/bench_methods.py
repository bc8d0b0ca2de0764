"""Every method at 8, 4, 3 and 2 bits on one model, ours and those of others: `make bench-methods`.

Each row is quantized by a script in a process of its own: benchmarks/methods/ours.py, or for a peer peer_NAME.py in a
virtual environment of its own (.cache/peers/methods-NAME, made when it is first asked for), which leaves the model with
its weights dequantized, as an ordinary folder. The script says how long it took (importing, for a peer also loading
and writing, not counted), its peak of memory and the bits of everything that is stored. Then `bitfold.evaluate`
judges either kind of folder; activations that a peer would round at run time are rounded for it.
Both get the same calibration text, windows, groups (64 weights; 8 bits a row), steps and threads.

Each row is appended to build/methods/rows.jsonl when it is measured and not measured again; --fresh forgets them all.
With --minutes 60 no row is begun after an hour: call again to go on. The rows that take longest come last.

    python benchmarks/bench_methods.py MODEL [--rows 'gptq-4' 'hqq*'] [--ours | --peers] [--tokens 20480]
                                        [--blocks 4] [--minutes 60] [--list | --show]
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitfold
from bitfold.kernels.activations import quantize_tokens
from bitfold.recipes.catalog import METHODS

HERE = Path(__file__).parent
WORK = HERE.parent / "build" / "methods"
DATA = HERE.parent / "src" / "bitfold" / "text" / "data"
ENVIRONMENTS = HERE.parent / ".cache" / "peers"
TORCH = os.environ.get("TORCH", "torch")
BITS = (8, 4, 3, 2)
# Where other numbers of bits say nothing, or (aqlm: a third of an hour a row, more with more books) take too long.
EASY = {"wanda": (8, 4), "sparsegpt": (8, 4), "signround": (4, 3, 2), "aqlm": (2,)}
COMMON = [TORCH, "transformers safetensors numpy"]
# It asks for a newer torch than it needs, and with it for gigabytes of CUDA.
GPTQMODEL = [
    "accelerate threadpoolctl device-smi protobuf pypcre tokenicer logbar datasets torchao defuser setuptools wheel",
    "--no-deps --no-build-isolation gptqmodel",
]
# A quarter of an hour and more, on a model of 135M parameters and two cores.
LONG = ("aqlm-*", "signround-*", "autoround:*", "gptqmodel:awq-*")
# What each environment installs, in this order, and the methods and bits it is asked for.
PEERS: dict[str, tuple[list[str], dict[str, tuple[int, ...]]]] = {
    "hqq": ([*COMMON, "hqq"], {"hqq": BITS}),
    "quanto": ([*COMMON, "optimum-quanto"], {"rtn": (8, 4, 2)}),
    "bitsandbytes": ([*COMMON, "bitsandbytes"], {"nf4": (4,), "llm-int8": (8,)}),
    "gptqmodel": ([*COMMON, *GPTQMODEL], {"gptq": BITS, "awq": (4,)}),
    "autoround": ([*COMMON, "auto-round"], {"signround": (4, 3, 2)}),
    "llmcompressor": ([*COMMON, "llmcompressor"], {"gptq": (8, 4), "awq": (4,), "smoothquant": (8,)}),
    "torchao": ([*COMMON, "torchao"], {"rtn": (8, 4)}),
    "llama_cpp": ([*COMMON, "llama-cpp-python gguf"], {"imatrix": BITS}),
}
# Peers whose inputs are rounded to 8 bits at run time, and the magnitude from which on a column is not.
ROUNDED = {"bitsandbytes:llm-int8": 6.0, "llmcompressor:smoothquant": float("inf")}


@dataclass(frozen=True)
class Case:
    """One row: a peer ("bitfold" for ours), a method, bits."""

    peer: str
    method: str
    bits: int

    @property
    def name(self) -> str:
        """How it is asked for."""
        return f"{'' if self.peer == 'bitfold' else self.peer + ':'}{self.method}-{self.bits}"


def cases() -> list[Case]:
    """All rows, long ones last; `auto` is rtn from 5 bits on and trellis below, so it has none of its own."""
    ours: list[Case] = []
    for name, method in METHODS.items():
        bits = EASY.get(name) or [b for b in BITS if not method.formats or b in method.formats]
        ours += [Case("bitfold", name, b) for b in bits]
    theirs = [Case(peer, m, b) for peer, (_, methods) in PEERS.items() for m, bits in methods.items() for b in bits]
    return sorted(ours + theirs, key=lambda case: any(fnmatch.fnmatchcase(case.name, long) for long in LONG))


def environment(peer: str) -> Path:
    """Its interpreter; the environment is made if it is not there."""
    folder = ENVIRONMENTS / f"methods-{peer}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (folder / "complete").exists():
        print(f"making {folder} ...", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        for wanted in PEERS[peer][0]:
            subprocess.run([python, "-m", "pip", "install", "-q", *wanted.split()], check=True)
        (folder / "complete").touch()
    return python


def quantize(case: Case, model: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Make the folder; wall and CPU seconds, peak memory and bits per weight of it."""
    ours = case.peer == "bitfold"
    script = HERE / "methods" / ("ours.py" if ours else f"peer_{case.peer}.py")
    command = [sys.executable if ours else environment(case.peer), script, model.resolve(), out]
    command += [case.method, case.bits]
    command += ["--calibration", DATA / "wikitext2-valid.txt", "--nsamples", options.nsamples]
    command += ["--seqlen", options.seqlen, "--steps", options.steps]
    log = WORK / "logs" / f"{case.name.replace(':', '-')}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as complaints:
        # Some leave files of theirs where they are run.
        done = subprocess.run(
            [str(c) for c in command], stdout=subprocess.PIPE, stderr=complaints, text=True, cwd=log.parent
        )
    if done.returncode:
        last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no words"])[-1]
        raise RuntimeError(last)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def rounding(threshold: float) -> Any:
    """A hook that rounds the inputs of a layer to int8, token by token; columns that reach the threshold stay."""

    def hook(_layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = inputs[0].flatten(0, -2)
        large = (x.abs() >= threshold).any(0)
        codes, scale = quantize_tokens(torch.where(large, 0.0, x))
        return (torch.where(large, x, codes * scale).view_as(inputs[0]),)

    return hook


def judge(case: Case, out: Path, model: Path, tokens: int) -> dict[str, Any]:
    """KL, perplexity and agreement of the folder."""
    judged: Any = out
    threshold = ROUNDED.get(f"{case.peer}:{case.method}")
    if threshold is not None:
        judged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        for name, layer in judged.named_modules():
            if isinstance(layer, torch.nn.Linear) and ".layers." in name:
                layer.register_forward_pre_hook(rounding(threshold))
    text = DATA / "wikitext2-test.txt"
    found = bitfold.evaluate(judged, model, text, max_tokens=tokens, cache_dir=WORK / "reference")
    return {"kl": found.kl_mean, "perplexity": found.perplexity, "top1": found.top1}


def first_blocks(model: Path, count: int) -> Path:
    """A folder with the first blocks of the model: no language model any more, but all methods meet the same layers."""
    folder = WORK / f"first-{count}"
    if not folder.exists():
        whole = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        whole.model.layers = whole.model.layers[:count]
        whole.config.num_hidden_layers = count
        if getattr(whole.config, "layer_types", None):
            whole.config.layer_types = whole.config.layer_types[:count]
        whole.save_pretrained(folder)
        AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def measure(case: Case, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The row; one that could not be measured says why."""
    row: dict[str, Any] = {"name": case.name, "peer": case.peer, "method": case.method, "bits": case.bits}
    out = WORK / f"out-{os.getpid()}"
    try:
        row |= quantize(case, model, out, options)
        return row | judge(case, out, model, options.tokens)
    except (RuntimeError, OSError, ValueError, subprocess.CalledProcessError, bitfold.errors.BitfoldError) as error:
        return {**row, "missing": (str(error).splitlines() or [repr(error)])[0][:200]}
    finally:
        shutil.rmtree(out, ignore_errors=True)


def number(value: float) -> str:
    """Two decimals; of a ruined model only its size."""
    return f"{value:.2f}" if value < 1e5 else f"{value:.0e}"


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: by bits, least loss first."""
    for bits in BITS:
        here = sorted((r for r in rows if r["bits"] == bits and "kl" in r), key=lambda r: float(r["kl"]))
        if not here:
            continue
        yield f"\n**{bits} bits**\n"
        yield "| method | by | stored bits per weight | KL | perplexity | same top token | CPU seconds | peak GiB |"
        yield "|---" * 8 + "|"
        for r in here:
            yield (
                f"| {r['method']} | {r['peer']} | {r['bpw']:.3f} | {r['kl']:.4f} | {number(r['perplexity'])}"
                f" | {100 * r['top1']:.1f} % | {r['cpu']:.0f} | {r['peak_memory'] / 2**30:.2f} |"
            )
    for title, key in (("What the types were", "note"), ("Not measured", "missing")):
        there = [r for r in rows if key in r]
        if there:
            yield f"\n{title}:\n"
            yield from (f"* {r['name']}: {r[key]}" for r in there)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=HERE.parent / "demo" / "original")
    parser.add_argument("--rows", nargs="*", default=["*"], help="names or globs of rows, see --list")
    parser.add_argument("--ours", action="store_true", help="no peers")
    parser.add_argument("--peers", action="store_true", help="peers only")
    parser.add_argument("--tokens", type=int, default=4096, help="of text to judge on")
    parser.add_argument("--nsamples", type=int, default=8, help="windows of calibration text")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of a window")
    parser.add_argument("--steps", type=int, default=40, help="of signround and AutoRound, two windows each")
    parser.add_argument("--blocks", type=int, help="of the model only the first so many, rows kept apart")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no row is begun")
    parser.add_argument("--fresh", action="store_true", help="forget the rows that are there")
    parser.add_argument("--show", action="store_true", help="measure nothing, show what is there")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    options = parser.parse_args()
    wanted = [c for c in cases() if any(fnmatch.fnmatchcase(c.name, pattern) for pattern in options.rows)]
    wanted = [c for c in wanted if not (options.ours if c.peer != "bitfold" else options.peers)]
    if options.list:
        print("\n".join(case.name for case in wanted))
        return
    WORK.mkdir(parents=True, exist_ok=True)
    file = WORK / (f"rows-{options.blocks}.jsonl" if options.blocks else "rows.jsonl")
    if options.blocks and not options.show:
        options.model = first_blocks(options.model, options.blocks)
    if options.fresh:
        file.unlink(missing_ok=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    known, started = {row["name"] for row in rows}, time.monotonic()
    left = [] if options.show else [case for case in wanted if case.name not in known]
    for number, case in enumerate(left):
        if time.monotonic() - started > 60 * options.minutes:
            print(f"{len(left) - number} rows are left; the same command goes on with them", file=sys.stderr)
            break
        print(case.name, "...", file=sys.stderr, flush=True)
        rows.append(measure(case, options.model, options))
        with file.open("a", encoding="utf-8") as log:
            log.write(json.dumps(rows[-1]) + "\n")
    if not options.show:
        print(f"{options.nsamples} x {options.seqlen} tokens of calibration text, judged on {options.tokens} tokens")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
