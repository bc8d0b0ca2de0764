"""Text of our engine and of others on the same models: tokens per second read and written, alternating, in one run.

    python benchmarks/bench_decode.py --model NAME=OURS[,OURS...]:FILE.gguf[,FILE.gguf...] [--model ...]
                                      [--shape llama-1b] [--requantize Q4_0 Q2_K ...] [--threads 2] [--prompt 512]
                                      [--tokens 64] [--rounds 3] [--peers llama_cpp openvino] [--json FILE]

Of a model: what bitfold runs (folders, or GGUF files as they are) and the files that the others run; --requantize has
llama.cpp write these types out of the first file as well. A shape is run with random weights: OURS_OF_SHAPES here,
THEIRS_OF_SHAPES there. Each engine runs in a process of its own and every round runs all of them once; the table has
medians of the rounds. Peers live in environments of their own, as those of bench_peers.py. llama.cpp is compiled with
the flags of this machine; gcc 12 builds AMX kernels that crash, `CC=clang CXX=clang++` in the environment helps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_peers import ENVIRONMENTS, HERE, environment

PEERS = {"llama_cpp": "llama.cpp", "openvino": "OpenVINO GenAI"}
# Formats of the linear layers and of the output head, at about the bits of the others' types below.
OURS_OF_SHAPES = ["int8/int8", "int4-g64/int6", "trellis-4/int6", "trellis-3/int6", "trellis-2/int5"]
THEIRS_OF_SHAPES = ["Q8_0", "Q4_0", "Q4_K", "Q3_K", "Q2_K", "IQ2_XXS"]
FILES = ENVIRONMENTS.parent / "decode"


@dataclass
class Engine:
    """One that runs one model: who, which weights, how it is called, and what it measured."""

    model: str
    who: str
    weights: str
    command: list[str]
    runs: list[dict[str, Any]] = field(default_factory=list)
    missing: str = ""

    def run(self) -> None:
        """Once more, unless it cannot."""
        if self.missing:
            return
        done = subprocess.run(self.command, capture_output=True, text=True, check=False)
        try:
            self.runs.append(_figures(done.stdout))
        except ValueError:
            told = done.stderr.strip().splitlines()
            self.missing = told[-1] if told else f"its process ended with {done.returncode}"

    def median(self, name: str) -> float:
        return statistics.median(run[name] for run in self.runs)


def _figures(text: str) -> dict[str, Any]:
    found = json.loads(text[text.index("{") :])
    if "speeds" not in found:
        return dict(found)
    (speed,) = found["speeds"]
    return {name: speed[name] for name in ("prefill", "decode", "bandwidth", "share")} | {
        "nbytes": speed["token_bytes"]
    }


def ours(args: argparse.Namespace, model: str, what: str) -> Engine:
    """`bitfold bench` of a folder, a file, or FORMAT/FORMAT of a shape."""
    given = [what]
    if model in args.shape:
        linear, head = what.split("/")
        given = ["--shape", model, "--format", linear, "--embedding", head]
    lengths = ["--threads", str(args.threads), "--prompt-tokens", str(args.prompt), "--tokens", str(args.tokens)]
    command = [sys.executable, "-m", "bitfold", "bench", *given, *lengths, "--turns", "1", "--json"]
    return Engine(model, "bitfold", what if model in args.shape else Path(what).name, command)


def theirs(args: argparse.Namespace, model: str, file: Path) -> Iterator[Engine]:
    for peer in args.peers:
        script = HERE / "peers" / f"decode_{peer}.py"
        lengths = ["--threads", str(args.threads), "--prompt", str(args.prompt), "--tokens", str(args.tokens)]
        made = Engine(model, PEERS[peer], file.stem, [])
        try:
            python = environment("openvino_genai" if peer == "openvino" else peer)
        except (OSError, subprocess.CalledProcessError) as error:
            made.missing = f"cannot be installed: {error}"
        else:
            made.command = [str(python), str(script), str(file), *lengths, "--turns", "1"]
        yield made


def requantized(model: str, source: Path, kind: str) -> Path:
    """The same model in another type, by llama.cpp's own quantizer."""
    target = FILES / f"{model}-{kind}.gguf"
    if not target.exists():
        FILES.mkdir(parents=True, exist_ok=True)
        aside = target.with_suffix(".part")
        script = [str(environment("llama_cpp")), str(HERE / "peers" / "decode_llama_cpp.py"), str(source)]
        subprocess.run([*script, "--write", f"{kind}={aside}"], check=True)
        aside.replace(target)
    return target


def random_file(shape: str, kind: str) -> Path:
    from random_gguf import write

    target = FILES / f"{shape}-{kind}.gguf"
    if not target.exists():
        FILES.mkdir(parents=True, exist_ok=True)
        write(shape, kind, target.with_suffix(".part"))
        target.with_suffix(".part").replace(target)
    return target


def engines(args: argparse.Namespace) -> Iterator[Engine]:
    for given in args.model:
        name, _, rest = given.partition("=")
        mine, _, others = rest.rpartition(":")
        files = [Path(file) for file in others.split(",") if file]
        for what in mine.split(","):
            yield ours(args, name, what)
        for file in [*files, *(requantized(name, files[0], kind) for kind in args.requantize)]:
            yield from theirs(args, name, file)
    for shape in args.shape:
        for what in args.ours:
            yield ours(args, shape, what)
        for kind in args.theirs:
            yield from theirs(args, shape, random_file(shape, kind))


def table(found: Sequence[Engine]) -> str:
    """Markdown: each model's engines, fastest first, against the fastest of the others."""
    lines = []
    for model in dict.fromkeys(engine.model for engine in found):
        here = [engine for engine in found if engine.model == model and engine.runs]
        others = [engine for engine in here if engine.who != "bitfold"]
        best = {name: max((e.median(name) for e in others), default=0.0) for name in ("decode", "prefill")}
        lines += [f"\n**{model}**\n", "| engine | weights | MB | writes tokens/s | reads tokens/s |", "|---" * 5 + "|"]
        for engine in sorted(here, key=lambda e: -e.median("decode")):
            cells = [engine.who, engine.weights, f"{engine.median('nbytes') / 1e6:.0f}"]
            for name in ("decode", "prefill"):
                ratio = f" ({engine.median(name) / best[name]:.2f}x)" if best[name] and engine.who == "bitfold" else ""
                cells.append(f"{engine.median(name):.1f}{ratio}")
            lines.append("| " + " | ".join(cells) + " |")
    absent = [f"* {e.model}, {e.who}, {e.weights}: {e.missing}" for e in found if e.missing]
    return "\n".join([*lines, *(["\nNot measured:", *absent] if absent else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--shape", action="append", default=[])
    parser.add_argument("--ours", nargs="*", default=OURS_OF_SHAPES, help="of shapes: LINEAR/HEAD")
    parser.add_argument("--theirs", nargs="*", default=THEIRS_OF_SHAPES, help="of shapes: ggml types")
    parser.add_argument("--requantize", nargs="*", default=[])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="all runs, as JSON lines")
    args = parser.parse_args()
    if not args.model and not args.shape:
        args.shape = ["llama-1b"]
    found = list(engines(args))
    for turn in range(args.rounds):
        for engine in found:
            engine.run()
            last = engine.missing or f"writes {engine.runs[-1]['decode']:.1f}, reads {engine.runs[-1]['prefill']:.0f}"
            print(f"{turn + 1}: {engine.model}, {engine.who}, {engine.weights}: {last}", file=sys.stderr)
        if args.json:
            rows = [{"model": e.model, "who": e.who, "weights": e.weights, **run} for e in found for run in e.runs]
            args.json.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    bandwidths = [run["bandwidth"] for engine in found for run in engine.runs if "bandwidth" in run]
    if bandwidths:
        print(f"{args.threads} threads, medians of {args.rounds} rounds, reads up to {max(bandwidths) / 1e9:.1f} GB/s")
    print(table(found))


if __name__ == "__main__":
    main()
