"""Sizes as people write and read them: decimal units, as disks and networks count."""

from __future__ import annotations

import re

from bitfold.errors import UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[KMGT]?)(?P<binary>i?)B?", re.IGNORECASE)


def parse_size(text: str, *, where: str) -> int:
    """Bytes of "4GB", "500 MB", "2GiB" or "123".

    Raises:
        UsageError: anything else, or zero; `where` names the option.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = match["unit"].upper() if match else ""
    if match is None or (match["binary"] and not unit):
        raise UsageError(f"{text!r} is not a size", where=where, hint="write it like 4GB, 500MB or 2GiB")
    size = int(float(match["number"]) * (_BINARY if match["binary"] else _UNITS)[unit])
    if size < 1:
        raise UsageError("must be at least one byte", where=where)
    return size


def size_text(nbytes: float) -> str:
    """Bytes with three significant digits: `987 B`, `84.2 MB`, `1.23 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 999.5:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB" if nbytes < 999.5 else f"{nbytes:.0f} TB"
