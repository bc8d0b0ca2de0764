"""Where a run keeps its work until the result is whole: `.NAME.partial` beside the folder NAME that is to be made.

journal.jsonl    what is finished, see `Journal`
result/          the folder to be; it gets its name last, in one step
state/           what a calibrated run needs to go on: activations, token weights
parts/           what other processes have made, until it is in the result
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bitfold.checkpoints.shards import written_error
from bitfold.checkpoints.staging import found_at, partial_of, placed, publish, refuse_existing, sync_folder
from bitfold.errors import CheckpointError
from bitfold.system.backend import fast_dtype
from bitfold.version import __version__
from bitfold.workspace.journal import NAME, Journal, finished

_CONFIGS = ("config.json", "adapter_config.json")  # of a model, of an adapter


class Workspace:
    """The folder of an unfinished run.

    Args:
        out: the folder to be made.
        identity: what decides its bytes, see `Journal`.
        restart: forget what an earlier run left.
        single: name of the one file in `result` that is all there is to be, but for its parts; None: the folder is.

    `published` is what an earlier run finished, and only had no time to clean up after; None = none did.

    Raises:
        CheckpointError: `out` exists, or the work of another run is there.
    """

    def __init__(
        self, out: Path, identity: Mapping[str, Any], *, restart: bool = False, single: str | None = None
    ) -> None:
        self.out, self.folder, self._single = out, partial_of(out), single
        self.published = None if restart else _published(out, self.folder, single)
        if self.published is None:
            refuse_existing(out, single=single is not None)
        self.journal = Journal(self.folder, identity, restart=restart)
        self.result, self.state = self.folder / "result", self.folder / "state"
        self.parts = self.folder / "parts"
        try:
            for folder in () if self.published is not None else (self.result, self.state):
                folder.mkdir(exist_ok=True)
        except OSError as error:
            self.journal.close()
            raise written_error(error, self.folder, "cannot be made") from error

    def publish(self) -> Path:
        """Give the result its name, which is returned. From here on there is nothing to go on with."""
        try:
            self.journal.append({"kind": "done"})
            self.journal.sync()
            sync_folder(self.result)
        except OSError as error:
            raise written_error(error, self.out, "cannot be given its name") from error
        found = publish(self.result, self.out, self._single)
        self.journal.discard()
        return found

    def leave(self) -> bool:
        """Close after a failure; work that is worth going on with stays. Says whether any does."""
        if self.journal.resumed:
            self.journal.close()
            return True
        self.journal.discard()
        return False


@contextmanager
def kept_after_failure(work: Workspace) -> Iterator[None]:
    """After a failure, what is finished stays for the next time, and it is said where."""
    try:
        yield
    except BaseException:
        if work.leave():
            what = f"what is finished is kept in {work.folder}"
            warnings.warn(f"{what}: the same command goes on with it, --restart begins anew", stacklevel=4)
        raise


def _published(out: Path, folder: Path, single: str | None) -> Path | None:
    """The result, where it has its place and the journal was not yet removed; a move of files that was cut short is
    ended."""
    result = folder / "result"
    if result.is_dir() and finished(folder) and _can_go_on(result, out, single):
        publish(result, out, single)
    found = found_at(out)
    whole = found is not None and (single is not None or any((out / name).is_file() for name in _CONFIGS))
    return found if (folder / NAME).is_file() and not result.exists() and whole else None


def _can_go_on(result: Path, out: Path, single: str | None) -> bool:
    """Whether the rest of a move takes the place of nothing."""
    if single is None:
        return out.is_dir()
    return not any(placed(path.name, out, single).exists() for path in result.iterdir())


def size_of(folder: Path) -> int:
    """Bytes on the disk of the files in a folder and below; 0 where there is none."""
    if not folder.is_dir():
        return 0
    stats = [file.stat() for file in folder.rglob("*") if file.is_file()]
    return sum(min(s.st_size, getattr(s, "st_blocks", s.st_size) * 512) for s in stats)


def free_bytes(folder: Path) -> int:
    """Room on the disk on which a folder is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@cache
def software() -> dict[str, str]:
    """What decides bytes besides source and options: the code, the libraries, the instruction set."""
    import transformers

    return {
        "bitfold": f"{__version__} {_digest_of_package()}",
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {fast_dtype()}",
    }


def require_same_software(asked: Mapping[str, str]) -> None:
    """CheckpointError where this process is not of the `software` that is asked for."""
    found = software()
    if different := [f"{n} ({found.get(n)} here, {v} there)" for n, v in asked.items() if found.get(n) != v]:
        raise other_result(different)


def other_result(different: Sequence[str]) -> CheckpointError:
    """The error of a worker that differs in such things from the program that called it."""
    what = (
        f"a worker would come to another result than the program that called it: different are {', '.join(different)}"
    )
    hint = "the same bitfold, libraries, kind of processor and source everywhere"
    return CheckpointError(what, where="--executor", hint=hint)


def _digest_of_package() -> str:
    """Of the sources and the native core: a changed method is another version, whatever its number."""
    from bitfold.system import native

    digest = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    core = getattr(native.core(), "__file__", None)
    if core is not None:
        digest.update(Path(core).read_bytes())
    return digest.hexdigest()[:16]
