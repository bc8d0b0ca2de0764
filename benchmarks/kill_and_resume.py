"""Kill a calibrated run at random moments, go on with it, compare every byte with a run that nothing disturbed.

    python benchmarks/kill_and_resume.py [--trials 50] [--seed 0]

Each trial forks a process that quantizes a small model, kills it (SIGKILL) at a random moment of the run's usual time,
and goes on in another process, which is killed as well one time in three. Prints one JSON object; exit code 1 unless
all folders are identical. POSIX only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests"))

import bitfold
import bitfold.run.driver
import tiny_lm
from bitfold import Calibration
from bitfold.checkpoints.staging import partial_of
from bitfold.records.record import FILE as RECORD
from bitfold.workspace.folder import software
from bitfold.workspace.journal import NAME


def content(folder: Path) -> dict[str, str]:
    """Every file by its hash, but for the record of times and memory."""
    files = sorted(f for f in folder.iterdir() if f.name != RECORD)
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def begin(source: Path, out: Path) -> int:
    """A process that quantizes; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        warnings.simplefilter("ignore")
        text = Calibration(str(source / "text.txt"), nsamples=4, seqlen=32, fisher=True)
        bitfold.quantize(source, out, format="int4-g32", method="ldlq", calibration=text, max_shard_bytes=60_000)
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(code)


def finish(source: Path, out: Path, after: float | None) -> bool:
    """Run a process, kill it after so many seconds; whether it came to its end."""
    child = begin(source, out)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a run failed that nothing disturbed")
    # Killed after the folder had its name and the journal was gone: there is nothing to go on with.
    return os.WIFEXITED(status) or (out.is_dir() and not partial_of(out).exists())


def last_record(out: Path) -> str:
    """What was noted last when the process died."""
    journal = partial_of(out) / NAME
    if not journal.is_file():
        return "finished" if out.exists() else "nothing"
    lines = [line for line in journal.read_bytes().split(b"\n") if line]
    return str(json.loads(lines[-1][9:])["kind"]) if lines else "nothing"


def main() -> int:
    """All trials."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, killed, identical, moments = random.Random(options.seed), 0, 0, []
    software()  # remembered before the first fork: sources may be edited meanwhile
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source = tiny_lm.folder(work / "source", tiny_lm.model())
        (source / "text.txt").write_text(tiny_lm.TEXT, encoding="utf-8")
        started = time.perf_counter()
        finish(source, work / "undisturbed", None)
        usual, expected = time.perf_counter() - started, content(work / "undisturbed")
        for trial in range(options.trials):
            out = work / str(trial)
            done = finish(source, out, chance.uniform(0, usual))
            killed += not done
            moments.append(last_record(out))
            if not done and chance.random() < 1 / 3:
                done = finish(source, out, chance.uniform(0, usual / 2))
            if not done:
                finish(source, out, None)
            identical += content(out) == expected and not partial_of(out).exists()
    counts = {kind: moments.count(kind) for kind in sorted(set(moments))}
    print(json.dumps({"trials": options.trials, "killed": killed, "identical": identical, "died after": counts}))
    return 0 if identical == options.trials else 1


if __name__ == "__main__":
    sys.exit(main())
