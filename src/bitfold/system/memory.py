"""How much memory this process has, may have, and had at most; all in bytes of resident memory.

Resident memory is what the operating system counts for the process: weights, activations, libraries, and the pages of
files that are mapped. Ceilings are about this number, because it is what an out-of-memory killer looks at.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from bitfold.errors import ResourceError
from bitfold.system.units import size_text

SHARE = 0.8  # of the memory that is free, for runs that name no ceiling
_CGROUP = Path("/sys/fs/cgroup")


def resident() -> int | None:
    """Of this process now; None where the system does not tell."""
    return _status("VmRSS")


def peak() -> int | None:
    """The largest so far; None where the system does not tell."""
    # Not getrusage on Linux: its maximum starts at the size of the process that started this one.
    found = _status("VmHWM")
    if found is not None:
        return found
    try:
        import resource
    except ImportError:  # Windows
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(largest if sys.platform == "darwin" else largest * 1024)


def _status(field: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    for line in status.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def available() -> int | None:
    """What the machine and its control groups would still give; None where nobody tells."""
    known = [value for value in (_machine_available(), _group_available()) if value is not None]
    return min(known) if known else None


def _machine_available() -> int | None:
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return _windows_available()
    try:
        import os

        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # macOS: half of what there is
    except (ValueError, OSError, AttributeError):
        return None


def _windows_available() -> int | None:
    class Status(ctypes.Structure):
        _fields_ = [
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            *(
                (name, ctypes.c_uint64)
                for name in ("total", "free", "page", "free_page", "virtual", "free_virtual", "x")
            ),
        ]

    status = Status(length=ctypes.sizeof(Status))
    kernel: Any = getattr(ctypes, "windll", None)
    return (
        int(status.free) if kernel is not None and kernel.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else None
    )


def _group_available(root: Path = _CGROUP, listing: Path = Path("/proc/self/cgroup")) -> int | None:
    """Room below the tightest limit of the control groups (versions 1 and 2) that this process is in."""
    if not listing.is_file():
        return None
    rooms = []
    for line in listing.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory") or "memory" in controllers.split(","):
            base = root if controllers == "" else root / "memory"
            names = ("memory.max", "memory.current") if controllers == "" else _VERSION_1
            folder = base / path.lstrip("/")
            for place in (folder, *folder.parents):
                if not place.is_relative_to(base):
                    break
                rooms.append(_room(place, names))
    known = [room for room in rooms if room is not None]
    return min(known) if known else None


_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def _room(folder: Path, names: tuple[str, str]) -> int | None:
    """Limit less usage, the cache of files that can be dropped not counted as usage."""
    try:
        limit, used = ((folder / name).read_text().strip() for name in names)
        if limit == "max" or int(limit) >= 1 << 60:
            return None
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cache = int(stat.get("inactive_file", stat.get("total_inactive_file", "0")))
        return max(0, int(limit) - int(used) + cache)
    except (OSError, ValueError):
        return None


def default_ceiling() -> int | None:
    """A sensible share of what is free, and what the process has already; None where nobody tells."""
    free = available()
    return None if free is None else int(SHARE * free) + (resident() or 0)


def trim() -> None:
    """Give memory that was freed back to the system, where the C library keeps it (glibc)."""
    function = _malloc_trim()
    if function is not None:
        function(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found


class Ceiling:
    """A promise about resident memory, kept or broken loudly.

    Args:
        limit: bytes; None = no promise.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._before = peak() or 0

    def check(self) -> None:
        """Give back what is free, and look.

        Raises:
            ResourceError: the process was larger than it may be.
        """
        trim()
        largest = peak()
        if self.limit is None or largest is None or largest <= max(self.limit, self._before):
            return
        hint = (
            "the estimate was wrong: raise the ceiling (the same command goes on with what is finished), and report it"
        )
        raise ResourceError(
            f"{size_text(largest)} of memory were used, {size_text(self.limit)} are allowed",
            where="--max-memory",
            hint=hint,
        )
