"""Models in object storage (`s3://bucket/model`, `gs://`, `az://` ...), through `fsspec`.

`fsspec` finds the library of the protocol (s3fs, gcsfs, adlfs), which knows logins and endpoints and tries again where
a server is busy. Here is what a program needs around it: only the files that bitfold reads, kept in a cache and fetched
again when they change there; a folder is sent so that it looks whole only once it is; errors that say what to do.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from bitfold.checkpoints.gguf.parts import part_names
from bitfold.checkpoints.hub.completeness import require_complete
from bitfold.checkpoints.weight_files import INDEX
from bitfold.errors import CheckpointError, UsageError
from bitfold.system import progress

T = TypeVar("T")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://.+", re.IGNORECASE)
_LIBRARIES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_ATTEMPTS = 4
_KEYS = ".keys.json"  # what each file in the cache was there, by its name
_LAST = ("config.json", INDEX)  # are sent last, and make a folder of what was sent before


def is_url(place: str | Path) -> bool:
    """Whether it names a place in object storage."""
    return isinstance(place, str) and _URL.fullmatch(place) is not None


def fetch(url: str, cache_dir: Path | None = None) -> Path:
    """The local folder, or GGUF file, of a model in object storage; what is in the cache and as it is there, is not
    fetched again.

    Args:
        url: of a folder with config.json and safetensors, or of a GGUF file (its other parts come with it).
        cache_dir: default: `~/.cache/bitfold/objects`, or what XDG_CACHE_HOME says in place of `~/.cache`.

    Raises:
        CheckpointError: there is no model, or the storage does not give it.
        UsageError: no library for the protocol is installed.
    """
    from bitfold.checkpoints.hub.fetch import files_beside, require_safetensors, weight_files

    place = _Place.of(url)
    files = place.files()
    here = (cache_dir or _cache()) / hashlib.sha256(place.url.encode()).hexdigest()[:16]
    if place.url.lower().endswith(".gguf"):
        folder, _, name = place.url.rpartition("/")
        place = _Place.of(folder)
        place.download([part for part in part_names(name) if part in place.files()] or [name], here)
        return here / name
    if not files:
        raise CheckpointError("there is nothing", where=url, hint="check the name; a folder is meant, or a GGUF file")
    require_safetensors(sorted(files), url)
    place.download([name for name in ("config.json", INDEX, "modules.json") if name in files], here)
    modules = _modules(here, files)
    place.download([*files_beside(sorted(files), modules), *weight_files(here, sorted(files))], here)
    require_complete(here, where=url)
    return here


def check_empty(url: str) -> None:
    """Call it before hours of work whose result is to be sent there.

    Raises:
        CheckpointError: a model is there already, or the storage does not answer.
        UsageError: no library for the protocol is installed.
    """
    if "config.json" in _Place.of(url).files():
        raise CheckpointError("there is a model already", where=url, hint="choose another name, or remove it")


def send(folder: Path, url: str) -> str:
    """Send a complete checkpoint folder; returns its address. What makes it look whole goes last.

    Raises:
        CheckpointError: it is not complete, a model is there already, or the storage does not take it.
        UsageError: no library for the protocol is installed.
    """
    require_complete(folder)
    check_empty(url)
    place = _Place.of(url)
    found = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts)]
    names.sort(key=lambda name: (name in _LAST, name == "config.json", name))
    with progress.bar("send", sum((folder / name).stat().st_size for name in names)) as bar:
        for name in names:
            place.upload(folder / name, name)
            bar.advance((folder / name).stat().st_size, name)
    return place.url


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitfold" / "objects"


def _modules(here: Path, files: dict[str, Any]) -> list[str]:
    from bitfold.checkpoints.side_files import module_folders

    text = (here / "modules.json").read_text(encoding="utf-8", errors="replace") if "modules.json" in files else ""
    return module_folders(text) if text else []


@dataclass(frozen=True)
class _Place:
    """A folder in object storage, or a file."""

    url: str
    system: Any
    path: str

    @classmethod
    def of(cls, url: str) -> _Place:
        import fsspec

        protocol = url.partition("://")[0].lower()
        library = _LIBRARIES.get(protocol, f"a library that fsspec knows for {protocol}://")
        try:
            system, path = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise UsageError(f"{protocol}:// needs {library}", where=url, hint=f"pip install {library}") from error
        except ValueError as error:
            what = f"cannot be understood: {error}"
            raise UsageError(what, where=url, hint="a folder here, org/name, or s3://bucket/folder") from error
        return cls(url.rstrip("/"), system, path.rstrip("/"))

    def files(self) -> dict[str, Any]:
        """What lies there, by name within the folder."""

        def listed() -> dict[str, Any]:
            self.system.invalidate_cache()
            found: dict[str, Any] = self.system.find(self.path, detail=True)
            return found

        found = self._patiently(listed)
        start = len(self.path) + 1
        return {path[start:]: info for path, info in found.items() if info.get("type") == "file" and path[start:]}

    def download(self, names: list[str], here: Path) -> None:
        """Fetch what is not here as it is there; each file gets its name when it is whole."""
        here.mkdir(parents=True, exist_ok=True)
        known = _read_keys(here / _KEYS)
        for name in dict.fromkeys(names):
            remote, local = f"{self.path}/{_inside(name, self.url)}", here / name
            key = self._patiently(lambda remote=remote: str(self.system.ukey(remote)))  # type: ignore[misc]
            if known.get(name) == key and local.is_file():
                continue
            local.parent.mkdir(parents=True, exist_ok=True)
            aside = local.with_name(f".{local.name}.incomplete")
            self._patiently(lambda remote=remote, aside=aside: self.system.get_file(remote, str(aside)))  # type: ignore[misc]
            expected = int(self._patiently(lambda remote=remote: self.system.info(remote)["size"]))  # type: ignore[misc]
            if aside.stat().st_size != expected:
                what = f"{aside.stat().st_size} bytes came, {expected} are there"
                raise CheckpointError(what, where=f"{self.url}/{name}", hint="run the command again")
            aside.replace(local)
            known[name] = key
            (here / f"{_KEYS}.tmp").write_text(json.dumps(known), encoding="utf-8")
            (here / f"{_KEYS}.tmp").replace(here / _KEYS)

    def upload(self, file: Path, name: str) -> None:
        """Send one file."""
        self._patiently(lambda: self.system.put_file(str(file), f"{self.path}/{name}"))

    def _patiently(self, action: Callable[[], T]) -> T:
        """Do it, several times where the failure may pass: the libraries say OSError for most of them."""
        for attempt in range(_ATTEMPTS):
            try:
                return action()
            except FileNotFoundError as error:
                hint = "check the name of bucket and folder"
                raise CheckpointError("there is no such place", where=self.url, hint=hint) from error
            except PermissionError as error:
                hint = "check the credentials, where the storage's own tools look for them"
                raise CheckpointError(f"no access: {_line(error)}", where=self.url, hint=hint) from error
            except Exception as error:  # of each library its own: timeouts, refused connections, missing logins
                if attempt + 1 == _ATTEMPTS or isinstance(error, TypeError | AttributeError):
                    hint = "is it reachable, and are there credentials? The same command goes on"
                    what = f"the storage fails: {type(error).__name__}: {_line(error)}"
                    raise CheckpointError(what, where=self.url, hint=hint) from error
                _sleep(_WAIT * 2**attempt)
        raise AssertionError("unreachable")


_WAIT = 1.0  # seconds before the second attempt
_sleep = time.sleep


def _inside(name: str, url: str) -> str:
    """A name that stays below its folder, whatever an index says."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise CheckpointError(f"the index names {name!r}, which is not in the folder", where=url)
    return name


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _read_keys(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
