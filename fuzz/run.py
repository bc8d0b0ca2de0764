"""Coverage-guided fuzzing of every reader with Atheris: `make fuzz`, or

    python fuzz/run.py SECONDS [TARGET ...]

Seconds are those of the processor, so that a busy machine fuzzes as much as an idle one, and calls nothing a hang that
only had to wait. Each target runs in a process of its own; the first broken promise ends it, and the input is left in
build/fuzz/TARGET.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

HERE = Path(__file__).parent
WORK = HERE.parent / "build" / "fuzz"
_NEVER = 10**6  # seconds on the clock
_HANG = 5  # seconds; `targets.check` is stricter, once the reader has come back


def fuzz_one(name: str, seconds: int) -> None:
    """Fuzz one target in this process; does not return."""
    import atheris
    import mutate
    import targets
    from seeds import seeds

    for function in functions():
        atheris.instrument_func(function)
    starts = seeds(name)
    corpus = WORK / name
    corpus.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(starts):
        (corpus / f"seed-{i}").write_bytes(seed)
    folder = targets.prepare(name, Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-")))

    def mutator(data: bytes, size: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if chance.random() < 0.5:
            return atheris.Mutate(data, size)
        try:
            return mutate.mutated(name, data, chance)[:size]
        except Exception:  # what was mutated is no longer of the shape that the structured mutation wants
            return mutate.mutated(name, chance.choice(starts), chance)[:size]

    started, done = time.process_time(), 0

    def one(data: bytes) -> None:
        nonlocal done
        if time.process_time() - started > seconds:
            print(f"{name}: {done} inputs in {seconds} s, {len(list(corpus.iterdir()))} of them kept", flush=True)
            os._exit(0)
        signal.setitimer(signal.ITIMER_PROF, _HANG)  # by default it ends the process, wherever that hangs
        targets.check(name, data, folder)
        signal.setitimer(signal.ITIMER_PROF, 0)
        done += 1

    print(f"the input at hand is in {folder}", flush=True)
    options = [
        f"-timeout={_NEVER}",
        "-max_len=65536",
        "-rss_limit_mb=4096",
        f"-artifact_prefix={corpus.parent}/{name}-",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one, custom_mutator=mutator)
    atheris.Fuzz()


def functions() -> Iterator[FunctionType]:
    """All functions of bitfold. Not by Atheris' import hook, which loses the native core of an editable install."""
    for name, module in list(sys.modules.items()):
        for value in list(vars(module).values()) if name.startswith("bitfold") else ():
            owner = vars(value).values() if isinstance(value, type) and value.__module__ == name else (value,)
            for found in owner:
                inner = getattr(found, "__func__", None) or getattr(found, "fget", None) or found
                if isinstance(inner, FunctionType) and inner.__module__ == name:
                    yield inner


def main() -> int:
    """All targets, one after the other."""
    from targets import TARGETS

    seconds, names = int(sys.argv[1]), sys.argv[2:] or list(TARGETS)
    failed = []
    for name in names:
        print(f"== {name}: {seconds} s", flush=True)
        code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import run; run.fuzz_one({name!r}, {seconds})"
        if subprocess.run([sys.executable, "-c", code], check=False).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "every reader kept its promises")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
