"""Every method at 8, 4, 3 and 2 bits on one model, ours and those of others: `make bench-methods`.

Ours run as `bitfold quantize --json` in a process of its own. A peer lives in a virtual environment of its own
(.cache/peers/methods-NAME) and runs benchmarks/methods/peer_NAME.py, which leaves the model with its weights
dequantized, as an ordinary folder, and says how long it took, its peak of memory and the bits of everything it would
store. Then `bitfold.evaluate` judges either kind of folder. Both get the same calibration text, windows and groups (64
weights; 8 bits a row). Activations that a peer would round at run time are not: those rows are of its weights.

Each row is appended to build/methods/rows.jsonl when it is measured and not measured again; --fresh forgets them all.

    python benchmarks/bench_methods.py MODEL [--rows 'gptq-4' 'hqq*'] [--ours | --peers] [--tokens 20480] [--list]
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitfold
from bitfold.catalog import METHODS

HERE = Path(__file__).parent
WORK = HERE.parent / "build" / "methods"
DATA = HERE.parent / "src" / "bitfold" / "data"
ENVIRONMENTS = HERE.parent / ".cache" / "peers"
TORCH = os.environ.get("TORCH", "torch")
BITS = (8, 4, 3, 2)
COMMON = [TORCH, "transformers safetensors numpy"]
# What each environment installs, in this order, and the methods and bits it is asked for.
PEERS: dict[str, tuple[list[str], dict[str, tuple[int, ...]]]] = {
    "hqq": ([*COMMON, "hqq"], {"hqq": BITS}),
    "quanto": ([*COMMON, "optimum-quanto"], {"rtn": (8, 4, 2)}),
    "bitsandbytes": ([*COMMON, "bitsandbytes"], {"nf4": (4,), "llm-int8": (8,)}),
    "gptqmodel": ([*COMMON, "gptqmodel"], {"gptq": BITS, "awq": (4,)}),
    "autoround": ([*COMMON, "auto-round"], {"signround": (4, 3, 2)}),
    "llmcompressor": ([*COMMON, "llmcompressor"], {"gptq": (8, 4), "awq": (4,), "smoothquant": (8,)}),
    "torchao": ([*COMMON, "torchao"], {"rtn": (8, 4)}),
}


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
    """All rows, methods together."""
    ours = [Case("bitfold", "auto", bits) for bits in BITS]
    for name, method in METHODS.items():
        ours += [Case("bitfold", name, bits) for bits in BITS if not method.formats or bits in method.formats]
    theirs = [Case(peer, m, b) for peer, (_, methods) in PEERS.items() for m, bits in methods.items() for b in bits]
    return ours + theirs


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
    """Make the folder; seconds, peak memory and bits per weight of it."""
    text = ["--calibration", str(DATA / "wikitext2-valid.txt"), "--nsamples", str(options.nsamples)]
    text += ["--seqlen", str(options.seqlen)]
    if case.peer != "bitfold":
        script = str(HERE / "methods" / f"peer_{case.peer}.py")
        command = [str(environment(case.peer)), script, str(model), str(out), case.method, str(case.bits), *text]
        found: dict[str, Any] = json.loads(last_line(command))
        return found
    needs = case.method == "auto" or METHODS[case.method].needs_text
    command = [
        sys.executable,
        "-m",
        "bitfold",
        "quantize",
        str(model),
        "-o",
        str(out),
        "--json",
        "--bits",
        str(case.bits),
    ]
    command += ["--method", case.method, *(text if needs else [])]
    report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    return {"seconds": report["seconds"], "peak_memory": report["peak_memory"], "bpw": report["bpw_quantized"]}


def last_line(command: list[str]) -> str:
    """What a script says at its end; RuntimeError with the end of its complaints."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no words"])[-1][:200])
    return done.stdout.strip().splitlines()[-1]


def measure(case: Case, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The row; one that could not be measured says why."""
    row: dict[str, Any] = {"name": case.name, "peer": case.peer, "method": case.method, "bits": case.bits}
    out = WORK / "out"
    shutil.rmtree(out, ignore_errors=True)
    try:
        row |= quantize(case, model, out, options)
        text = DATA / "wikitext2-test.txt"
        found = bitfold.evaluate(out, model, text, max_tokens=options.tokens, cache_dir=WORK / "reference")
        return {**row, "kl": found.kl_mean, "perplexity": found.perplexity, "top1": found.top1}
    except (RuntimeError, OSError, ValueError, subprocess.CalledProcessError, bitfold.errors.BitfoldError) as error:
        return {**row, "missing": str(error).splitlines()[0][:200]}
    finally:
        shutil.rmtree(out, ignore_errors=True)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: by bits, least loss first."""
    for bits in BITS:
        here = sorted((r for r in rows if r["bits"] == bits and "kl" in r), key=lambda r: float(r["kl"]))
        if not here:
            continue
        yield f"\n**{bits} bits**\n"
        yield "| method | by | bits per weight | KL | perplexity | same top token | seconds | peak memory |"
        yield "|---" * 8 + "|"
        for r in here:
            yield (
                f"| {r['method']} | {r['peer']} | {r['bpw']:.3f} | {r['kl']:.4f} | {r['perplexity']:.2f}"
                f" | {100 * r['top1']:.1f} % | {r['seconds']:.0f} | {r['peak_memory'] / 2**30:.2f} GiB |"
            )
    absent = [r for r in rows if "missing" in r]
    if absent:
        yield "\nNot measured:\n"
        yield from (f"* {r['name']}: {r['missing']}" for r in absent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=HERE.parent / "demo" / "original")
    parser.add_argument("--rows", nargs="*", default=["*"], help="names or globs of rows, see --list")
    parser.add_argument("--ours", action="store_true", help="no peers")
    parser.add_argument("--peers", action="store_true", help="peers only")
    parser.add_argument("--tokens", type=int, default=8192, help="of text to judge on")
    parser.add_argument("--nsamples", type=int, default=16, help="windows of calibration text")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of a window")
    parser.add_argument("--fresh", action="store_true", help="forget the rows that are there")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    options = parser.parse_args()
    wanted = [c for c in cases() if any(fnmatch.fnmatchcase(c.name, pattern) for pattern in options.rows)]
    wanted = [c for c in wanted if not (options.ours if c.peer != "bitfold" else options.peers)]
    if options.list:
        print("\n".join(case.name for case in wanted))
        return
    WORK.mkdir(parents=True, exist_ok=True)
    file = WORK / "rows.jsonl"
    if options.fresh:
        file.unlink(missing_ok=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    for case in wanted:
        if any(row["name"] == case.name for row in rows):
            continue
        print(case.name, "...", file=sys.stderr, flush=True)
        rows.append(measure(case, options.model, options))
        with file.open("a", encoding="utf-8") as log:
            log.write(json.dumps(rows[-1]) + "\n")
    print(f"{options.nsamples} x {options.seqlen} tokens of calibration text, judged on {options.tokens} tokens")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
