"""Places to write to, tried before the work: what would fail at its end fails at its start, in words."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from pathlib import Path

from bitfold.errors import CheckpointError, UsageError

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+.", re.IGNORECASE)  # a path of it has lost one of its slashes; C:/ is a drive
_HINT = "choose another place, or ask for the right to write there"


def real_path(path: str | Path) -> Path:
    """The place that a path means: `~`, `.`, `..` and links resolved, whether anything is there or not.

    Raises:
        UsageError: links that go in a circle, no such home, a name that no file system takes; a place in object
            storage, which would become a folder here with a strange name.
    """
    if found := _URL.match(str(path)):
        hint = (
            f"a folder here; a finished one is sent there by `bitfold upload FOLDER {found[1]}://...` or --upload-repo"
        )
        raise UsageError("is a place in object storage", where=str(path), hint=hint)
    try:
        real = Path(path).expanduser().resolve()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            real.lstat()
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"is not a path: {_reason(error)}", where=str(path)[:200]) from error
    return real


def try_folder(folder: Path) -> None:
    """Make a file in a folder, and remove it; a folder that is not there is made for that, and removed as well.

    Raises:
        CheckpointError: it cannot be made or written into.
    """
    made: list[Path] = []
    try:
        for part in reversed([folder, *folder.parents]):
            if not os.path.lexists(part):
                part.mkdir()
                made.append(part)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".bitfold-"):
            pass
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be written into: {_reason(error)}", where=str(folder), hint=_HINT) from error
    finally:
        for part in reversed(made):
            part.rmdir()


def try_file(file: str | Path) -> Path:
    """Open a file as it will be opened for writing, without changing it; returns its real path.

    Raises:
        UsageError: it is a folder, or its folder is not there.
        CheckpointError: it cannot be written.
    """
    path = real_path(file)
    try:
        if path.is_dir():
            raise UsageError("is a folder", where=str(file), hint="name the file to write")
        if not path.parent.is_dir():
            raise UsageError("there is no such folder", where=str(path.parent), hint="make it first")
        if path.is_file():
            path.open("ab").close()
        elif not path.exists():  # neither a pipe nor a device, whose opening would wait or do something
            path.open("xb").close()
            path.unlink()
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise CheckpointError(f"cannot be written: {_reason(error)}", where=str(file), hint=_HINT) from error
    return path


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)
