"""Outputs are written aside, under a name that no loader looks at, and get their name when they are complete.

A folder that is not there yet is written beside its place (`.NAME.partial`) and renamed in one step. A folder that is
there and empty is kept, with its owner, its rights and whoever is standing in it: it may be a mount point, or what a
link means. It is written inside (`NAME/.partial`), and the files are moved up at the end, config.json last. An output
that is one file, or its parts, is written in such a folder as well, and moved out of it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitfold.checkpoints.shards import written_error
from bitfold.errors import CheckpointError
from bitfold.system.outputs import real_path, try_folder

JOURNAL = "journal.jsonl"  # the name of the journal of an unfinished run, see workspace/
_INSIDE = ".partial"
_NOTHING = {_INSIDE, "lost+found"}  # what an empty folder may hold: our own work, and what file systems are born with
_LAST = "config.json"  # loaders look for it first
_SUFFIX = ".gguf"  # of files that may come in parts
_PART = r"-\d{5}-of-\d{5}" + re.escape(_SUFFIX)
_LONGEST_NAME = 230  # bytes; with what is put around it, within the 255 of most file systems


def open_output(out: str | Path, source: Path | None = None, *, single: bool = False) -> Path:
    """The real path of an output, found good to write.

    Args:
        out: as the user wrote it.
        source: what is read; nothing may be written into it.
        single: it is one file, not a folder.

    Raises:
        UsageError: not a path.
        CheckpointError: something is there already, it lies within the source, or it cannot be written.
    """
    path = real_path(out)
    if single and path.is_dir():
        raise CheckpointError("is a folder", where=str(path), hint="name the file to write")
    if not (partial_of(path) / JOURNAL).exists():  # else a run goes on, which may have lacked no more than its end
        refuse_existing(path, single=single)
    try_folder(path)
    within = None if source is None else real_path(source)
    if within is not None and within.is_dir() and within in path.parents:
        raise CheckpointError("lies in the folder that is read", where=str(path), hint="choose another output folder")
    return path


def refuse_existing(out: Path, *, single: bool = False) -> None:
    """CheckpointError when there is something else than an empty folder, or unfinished work.

    Args:
        out: the output.
        single: it is one file, not a folder, and may become several.
    """
    if single and (parts := parts_of(out)):
        # Parts of two models under one name could not be told from each other.
        what, hint = "a part of a model of that name exists already", "choose another output, or remove its parts"
        raise CheckpointError(what, where=str(parts[0]), hint=hint)
    try:
        there = os.path.lexists(out) and not (out.is_dir() and {p.name for p in out.iterdir()} <= _NOTHING)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(out)) from error
    if there:
        raise CheckpointError("exists already", where=str(out), hint="choose another output folder, or remove it")


def partial_of(out: Path) -> Path:
    """Where an output folder is written until it is complete."""
    name = out.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    beside = out.with_name(f".{name}.partial") if name else out / _INSIDE
    return out / _INSIDE if out.is_dir() and not beside.exists() else beside


def parts_of(out: Path) -> list[Path]:
    """Files beside that go by the name of an output of one file as parts do: NAME-00001-of-00003.gguf of NAME.gguf."""
    named = re.compile(re.escape(out.name.removesuffix(_SUFFIX)) + _PART)
    return sorted(path for path in _beside(out) if named.fullmatch(path.name))


def _beside(out: Path) -> list[Path]:
    try:
        return list(out.parent.iterdir())
    except OSError:
        return []  # not there yet


def placed(name: str, out: Path, single: str) -> Path:
    """Where a file goes that is written aside: the one that is all of the output, or one of its parts."""
    if name == single:
        return out
    return out.with_name(out.name.removesuffix(_SUFFIX) + name.removeprefix(Path(single).stem))


def publish(folder: Path, out: Path, single: str | None = None) -> Path:
    """Give what was written in `folder` (or its file `single`, or the parts of that) its place; durable. May be called
    again after it was cut short.

    Returns: what loaders are to be given: the output, or the first of its parts.

    Raises:
        CheckpointError: the names cannot be given.
    """
    try:
        if single is not None:
            for path in sorted(folder.iterdir(), reverse=True):  # the first part last: loaders look for it first
                path.rename(placed(path.name, out, single))
            folder.rmdir()
        elif not out.is_dir():
            folder.rename(out)
        else:
            for path in sorted(folder.iterdir(), key=lambda p: (p.name == _LAST, p.name)):
                path.rename(out / path.name)
            folder.rmdir()
            sync_folder(out)
        sync_folder(out.parent)
    except OSError as error:
        raise written_error(error, out, "cannot be given its name") from error
    return found_at(out) or out


def found_at(out: Path) -> Path | None:
    """An output of one file, or the first of its parts; None where it is not there."""
    return out if out.exists() else next(iter(parts_of(out)), None)


@contextmanager
def written_aside(out: Path, single: str | None = None) -> Iterator[Path]:
    """A folder to write into, given its place if the block succeeds, removed if it does not.

    Args:
        out: from `open_output`.
        single: name of the one file that is the output; None: the folder is.

    Raises:
        CheckpointError: the folder cannot be made, or holds the unfinished work of `bitfold quantize`.
    """
    aside = partial_of(out)
    if (aside / JOURNAL).exists():
        hint = "finish that run, or remove the folder"
        raise CheckpointError("holds unfinished work of `bitfold quantize`", where=str(aside), hint=hint)
    try:
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir(parents=True)
    except OSError as error:
        raise written_error(error, aside, "cannot be made") from error
    try:
        yield aside
        publish(aside, out, single)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make names durable; Windows has no such thing."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # file systems that cannot (some network ones)
    finally:
        os.close(descriptor)
