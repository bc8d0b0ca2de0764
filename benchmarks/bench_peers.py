"""Our kernels and those of others on the same products, one after the other in one run.

Each peer lives in a virtual environment of its own (.cache/peers/NAME, made when it is first asked for) and runs
benchmarks/peers/speed_NAME.py, which takes weights of random values from DRAM in turn, as bench_kernels.py does.
A peer that cannot be installed, or has no such kernel, is listed with the reason.

All of them run in --rounds turns, and the table shows the best turn of each, itself a median: on a shared machine a
neighbour halves the speed for minutes, and one turn would show who had the quiet ones.

    python benchmarks/bench_peers.py [--peers torch onnxruntime openvino llama_cpp] [--threads 2] [--rows 1 8 512]
                                     [--shapes 4096x4096 14336x4096] [--formats trellis-2 ...] [--rounds 3]
                                     [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent / ".cache" / "peers"
TORCH = os.environ.get("TORCH", "torch")
# What each environment installs, in this order; torch first, so that nothing else chooses its build.
PEERS = {
    "torch": [TORCH, "torchao numpy"],
    "onnxruntime": ["onnxruntime onnx numpy"],
    "openvino": ["openvino numpy"],
    "llama_cpp": ["llama-cpp-python numpy"],
}
ENGINES = {"openvino_genai": ["openvino-genai numpy"]}  # of bench_decode.py
OURS = ["int8", "int4", "int4-g64", "int2-g64", "nf4", "trellis-2", "trellis-3", "trellis-4"]
Row = dict[str, Any]


def environment(peer: str) -> Path:
    """Its interpreter; the environment is made if it is not there."""
    folder = ENVIRONMENTS / peer
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = folder / "complete"
    if not done.exists():
        print(f"making {folder} ...", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        variables = {**os.environ, "CMAKE_ARGS": "-DGGML_NATIVE=ON"}
        for wanted in (PEERS | ENGINES)[peer]:
            subprocess.run([python, "-m", "pip", "install", "-q", *wanted.split()], check=True, env=variables)
        done.touch()
    return python


def measured(name: str, command: list[str]) -> Iterator[Row]:
    """The JSON lines of a script as they come; one that says why, if it fails."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as script:
        assert script.stdout is not None
        for line in script.stdout:
            if line.startswith("{"):
                yield {"peer": name, **json.loads(line)}
    if script.returncode:
        yield {"peer": name, "kernel": name, "missing": f"its script ended with {script.returncode}"}


def peer_rows(peer: str, options: list[str]) -> Iterator[Row]:
    try:
        python = environment(peer)
    except (OSError, subprocess.CalledProcessError) as error:
        yield {"peer": peer, "kernel": peer, "missing": f"cannot be installed: {error}"}
        return
    yield from measured(peer, [str(python), str(HERE / "peers" / f"speed_{peer}.py"), *options])


def our_rows(formats: list[str], options: list[str]) -> Iterator[Row]:
    command = [sys.executable, str(HERE / "bench_kernels.py"), "--json", "--formats", *formats, *options]
    for row in measured("bitfold", command):
        if "format" in row:
            row["kernel"] = f"bitfold {row['format']}, {row['act']} activations"
        yield row


def best_turns(rows: list[Row]) -> list[Row]:
    """The fastest row of each kernel and product; what is missing once."""
    best: dict[tuple[object, ...], Row] = {}
    for row in rows:
        key = (row["kernel"], row.get("n"), row.get("k"), row.get("m"), row.get("missing"))
        if key not in best or row.get("us", 0) < best[key].get("us", 0):
            best[key] = row
    return list(best.values())


def table(rows: list[Row], bandwidth: float) -> str:
    """Markdown, by shape and rows of activations, fastest first."""
    lines = []
    groups = sorted({(r["n"], r["k"], r["m"]) for r in rows if "us" in r})
    for n, k, m in groups:
        lines += [
            f"\n**{n} x {k}, M = {m}**\n",
            "| kernel | us | GB/s | of bandwidth | Gweight/s | GOPS |",
            "|---" * 6 + "|",
        ]
        here = [r for r in rows if (r.get("n"), r.get("k"), r.get("m")) == (n, k, m)]
        for row in sorted(here, key=lambda r: float(r["us"])):
            seconds = row["us"] / 1e6
            rate = row["nbytes"] / seconds
            lines.append(
                f"| {row['kernel']} | {row['us']:.0f} | {rate / 1e9:.1f} | {rate / bandwidth:.0%}"
                f" | {n * k / seconds / 1e9:.1f} | {2 * n * k * m / seconds / 1e9:.0f} |"
            )
    absent = [f"* {r['kernel']}: {r['missing']}" for r in rows if "missing" in r]
    return "\n".join([*lines, *(["\nNot measured:", *absent] if absent else [])])


def main() -> None:
    from bench_kernels import read_bandwidth

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--formats", nargs="*", default=OURS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", nargs="*", default=["1", "8", "512"])
    parser.add_argument("--shapes", nargs="*", default=["4096x4096", "14336x4096"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="all rows, as JSON lines")
    args = parser.parse_args()
    options = ["--threads", str(args.threads), "--rows", *args.rows, "--shapes", *args.shapes]
    rows: list[Row] = []
    bandwidths = [read_bandwidth(args.threads)]
    for turn in range(args.rounds):
        for row in itertools.chain(our_rows(args.formats, options), *(peer_rows(peer, options) for peer in args.peers)):
            rows.append({**row, "turn": turn})
            told = f"{row['n']}x{row['k']}, M = {row['m']}: {row['us']:.0f} us" if "us" in row else row["missing"]
            print(f"{turn + 1}: {row['kernel']}: {told}", file=sys.stderr)
            if args.json:
                args.json.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        bandwidths.append(read_bandwidth(args.threads))
    print(f"{platform.processor() or platform.machine()}, {args.threads} threads, best of {args.rounds} turns")
    print(f"read bandwidth {min(bandwidths) / 1e9:.1f} to {max(bandwidths) / 1e9:.1f} GB/s")
    print(table(best_turns(rows), max(bandwidths)))


if __name__ == "__main__":
    main()
