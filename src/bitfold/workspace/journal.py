"""The journal of a run: what is finished, so that the same command goes on where an earlier one stopped.

One line for each finished piece of work, each with a checksum, appended after the work itself is in its file. A line
that was cut off, and all that follows it, is forgotten; what a line says of a file is believed only if the file's hash
agrees. So little has to be forced to the disk in between: what a power failure takes away is missing, and done again.
A run is recognised by its identity (source, recipe, options, versions); the work of another one is refused.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from bitfold.checkpoints.shards import written_error
from bitfold.checkpoints.staging import JOURNAL
from bitfold.errors import CheckpointError

NAME = JOURNAL


class Journal:
    """An open journal; one process at a time.

    Args:
        folder: where the run keeps its work; made if it is not there.
        identity: JSON-able facts that decide the bytes of the result.
        restart: forget an earlier run, whatever it was.

    Raises:
        CheckpointError: the work of another run is there, or a process is at it now.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, restart: bool = False) -> None:
        self.folder, self.path = folder, folder / NAME
        self.records: list[dict[str, Any]] = []
        if folder.exists() and not self.path.exists():
            _remove(folder)  # nothing in it was ever finished
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = self.path.open("a+b")
        except OSError as error:
            raise written_error(error, folder, "cannot be made") from error
        try:
            _lock(self._file, folder)
            self._begin(json.loads(json.dumps(identity)), restart)
        except BaseException:
            self._file.close()
            raise

    def _begin(self, identity: dict[str, Any], restart: bool) -> None:
        self.records, end = _read(self._file)
        if restart or not self.records:
            for path in self.folder.iterdir():
                if path != self.path:
                    _remove(path)
            self.records, end = [], 0
        self._file.truncate(end)
        if not self.records:
            self.append({"kind": "run", "identity": identity})
        else:
            _compare(self.records[0]["identity"], identity, self.folder)

    @property
    def resumed(self) -> bool:
        """Whether an earlier run left finished work."""
        return len(self.records) > 1

    def append(self, record: Mapping[str, Any]) -> None:
        """Note a finished piece of work; CheckpointError when the disk is full."""
        text = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
        try:
            self._file.write(b"%08x %s\n" % (zlib.crc32(text), text))
            self._file.flush()
        except OSError as error:
            raise written_error(error, self.path, "cannot be written") from error
        self.records.append(dict(record))

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """All records of a kind, oldest first."""
        return [record for record in self.records if record["kind"] == kind]

    def sync(self) -> None:
        """Wait until the journal is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let others have it."""
        self._file.close()

    def discard(self) -> None:
        """Remove the folder with all the work."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def recorded(folder: Path) -> dict[str, Any]:
    """The identity of the run whose unfinished work is in a folder; empty where there is none."""
    try:
        with (folder / NAME).open("rb") as file:
            records, _ = _read(file)
    except OSError:
        return {}
    return dict(records[0]["identity"]) if records else {}


def finished(folder: Path) -> bool:
    """Whether the work in a folder was done, and only lacked its place."""
    try:
        with (folder / NAME).open("rb") as file:
            return any(record["kind"] == "done" for record in _read(file)[0])
    except OSError:
        return False


def _read(file: IO[bytes]) -> tuple[list[dict[str, Any]], int]:
    """The records before the first damaged line, and where they end."""
    file.seek(0)
    records: list[dict[str, Any]] = []
    end = 0
    for line in file.read().splitlines(keepends=True):
        crc, _, text = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text):
            break
        records.append(json.loads(text))
        end += len(line)
    return (records, end) if records and records[0].get("kind") == "run" else ([], 0)


def _compare(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    """CheckpointError that names what is different."""
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if not changed:
        return
    hint = "--restart (restart=True) forgets that work; the same command as then goes on with it"
    raise CheckpointError(
        f"holds unfinished work of another run: different are {', '.join(changed)}", where=str(folder), hint=hint
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _lock(file: IO[bytes], folder: Path) -> None:
    """Keep other processes out until the file is closed."""
    try:
        import fcntl
    except ImportError:  # Windows
        _lock_windows(file, folder)
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _busy(folder) from error
    except OSError:
        pass  # a file system without locks


def _lock_windows(file: IO[bytes], folder: Path) -> None:
    import importlib

    msvcrt: Any = importlib.import_module("msvcrt")
    file.seek(1 << 30)  # a byte beyond the text: locks there hinder no reader
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        raise _busy(folder) from error


def _busy(folder: Path) -> CheckpointError:
    hint = "wait for it, or choose another output folder"
    return CheckpointError("another process is writing here", where=str(folder), hint=hint)
