"""Coverage-guided fuzzing of every reader with Atheris: `make fuzz`, or

    python fuzz/run.py SECONDS [TARGET ...]

Each target runs in a process of its own; the first broken promise ends it, and the input is left in build/fuzz/TARGET.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

HERE = Path(__file__).parent
WORK = HERE.parent / "build" / "fuzz"


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

    options = [
        f"-max_total_time={seconds}",
        "-timeout=5",
        "-max_len=65536",
        "-print_final_stats=1",
        "-rss_limit_mb=4096",
    ]
    arguments = [sys.argv[0], *options, f"-artifact_prefix={corpus.parent}/{name}-", str(corpus)]
    atheris.Setup(arguments, lambda data: targets.check(name, data, folder), custom_mutator=mutator)
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
    seconds, names = int(sys.argv[1]), sys.argv[2:] or ["header", "index", "config", "gguf", "recipe"]
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
