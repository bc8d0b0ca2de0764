"""The manifest of a folder, and checking a folder against it: `bitfold verify`.

`bitfold_manifest.json` has the SHA-256 of every file, so that a byte that changed is found later, and says what
became of the source's tensors. The model card and the record of measurements are left out: they are meant to be edited.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitfold.checkpoints.bitfold_folder import stored_layouts
from bitfold.checkpoints.safetensors import SafetensorsSource, digest_of, write_json
from bitfold.checkpoints.shards import written_error
from bitfold.checkpoints.untrusted import read_json_object
from bitfold.errors import BitfoldError, CheckpointError
from bitfold.system import progress

FILE, VERSION = "bitfold_manifest.json", 1
_EDITED = (FILE, "README.md", "bitfold_report.json")


@dataclass
class Verification:
    """What was found in a folder.

    Args:
        folder: its path.
        problems: each with the file or tensor concerned; empty: all is as it was written.
        files, tensors, nbytes: how much was checked.
    """

    folder: str
    problems: list[str] = field(default_factory=list)
    files: int = 0
    tensors: int = 0
    nbytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with stable keys."""
        return {
            "folder": self.folder,
            "ok": not self.problems,
            "problems": self.problems,
            "files": self.files,
            "tensors": self.tensors,
            "bytes": self.nbytes,
        }


def write_manifest(folder: Path, source: Mapping[str, Any]) -> None:
    """Hash every file of a finished folder.

    Args:
        folder: with everything in it.
        source: what became of the tensors of the source, see `Account.totals`.
    """
    files = {name: {"bytes": f.stat().st_size, "sha256": digest_of(f)} for name, f in _files(folder).items()}
    try:
        write_json(folder / FILE, {"version": VERSION, "files": files, "source": source})
    except OSError as error:
        raise written_error(error, folder / FILE, "cannot be written") from error


def weights_digest(folder: Path) -> str | None:
    """Hash of the weights of a folder, out of its manifest; None where it has none."""
    files = read_json_object(folder / FILE).get("files") if (folder / FILE).is_file() else None
    if not isinstance(files, dict):
        return None
    known = {name: fact.get("sha256") for name, fact in files.items() if name.endswith(".safetensors")}
    return hashlib.sha256(repr(sorted(known.items())).encode()).hexdigest()


def carry_manifest(source: Path, folder: Path) -> None:
    """Hash every file of a folder that was made out of another one of ours, and take over what that one says of the
    tensors that it was made of."""
    old = read_json_object(source / FILE) if (source / FILE).is_file() else {}
    write_manifest(folder, old.get("source") or {})


def _files(folder: Path) -> dict[str, Path]:
    """Every file by its path within the folder, but for hidden ones and those that are meant to be edited."""
    found: dict[str, Path] = {}
    for at, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = {Path(at, name).relative_to(folder).as_posix(): Path(at, name) for name in sorted(files)}
        found |= {name: f for name, f in here.items() if name not in _EDITED and not f.name.startswith(".")}
    return found


def verify(folder: str | Path) -> Verification:
    """Check a folder: the hash of every file, and that every stored tensor is one that the config speaks of.

    Raises:
        CheckpointError: there is no manifest, or it cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError("there is no such folder", where=str(folder))
    if not (folder / FILE).is_file():
        hint = "folders that `bitfold quantize` wrote have one"
        raise CheckpointError(f"has no {FILE}, so there is nothing to check against", where=str(folder), hint=hint)
    manifest = read_json_object(folder / FILE)
    found = Verification(str(folder))
    _check_files(folder, _listed(manifest, folder), found)
    _check_tensors(folder, manifest, found)
    return found


def _listed(manifest: Mapping[str, Any], folder: Path) -> dict[str, tuple[int, str]]:
    try:
        if manifest["version"] != VERSION:
            what = f"is of version {manifest['version']}, this is version {VERSION}"
            raise CheckpointError(what, where=str(folder / FILE), hint="pip install -U bitfold")
        return {str(name): (int(e["bytes"]), str(e["sha256"])) for name, e in manifest["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"is damaged: {error!r}", where=str(folder / FILE)) from error


def _check_files(folder: Path, listed: Mapping[str, tuple[int, str]], found: Verification) -> None:
    here = _files(folder)
    found.problems += [f"{name}: is missing" for name in listed if name not in here]
    found.problems += [f"{name}: was not there when the folder was written" for name in here if name not in listed]
    common = [name for name in listed if name in here]
    with progress.bar("verify", sum(listed[name][0] for name in common)) as bar:
        for name in common:
            size, digest = listed[name]
            if here[name].stat().st_size != size:
                found.problems.append(f"{name}: has {here[name].stat().st_size} bytes, it had {size}")
            elif digest_of(here[name]) != digest:
                found.problems.append(f"{name}: its content has changed")
            found.files += 1
            found.nbytes += size
            bar.advance(size, name)


def _check_tensors(folder: Path, manifest: Mapping[str, Any], found: Verification) -> None:
    """Fields of quantized tensors complete and of the right shape, every other tensor kept or unused, sums right."""
    try:
        source = SafetensorsSource(folder)
        config = source.config["quantization_config"]
        expected = stored_layouts(folder)
        named = {*expected, *config["kept"], *config["unused"]}
    except (BitfoldError, KeyError, TypeError) as error:
        found.problems.append(f"config.json or the shards cannot be read: {error}")
        return
    stored = {name: source.info(name) for name in source.names()}
    found.tensors = len(stored)
    for name, info in expected.items():
        if stored.get(name) != info:
            found.problems.append(f"{name}: is missing or misshapen")
    found.problems += [f"{name}: config.json does not speak of it" for name in stored if name not in named]
    found.problems += [f"{name}: is missing" for name in config["kept"] if name not in stored]
    totals = manifest.get("source")
    if isinstance(totals, dict) and not _adds_up(totals):
        found.problems.append(f"{FILE}: the fates of the source's tensors do not add up")


def _adds_up(totals: Mapping[str, Any]) -> bool:
    try:
        parts = [part for name, part in totals.items() if name != "all"]
        return all(sum(p[key] for p in parts) == totals["all"][key] for key in ("tensors", "bytes"))
    except (KeyError, TypeError):
        return False
