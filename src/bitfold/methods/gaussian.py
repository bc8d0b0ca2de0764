"""The table of formats: range, levels, exact bits per weight, and the signal-to-noise ratio on Gaussian weights.

The ratio is measured with the fit that `bitfold quantize` uses, on a fixed sample. That takes a while for some eighty
formats, so the measured numbers travel with the package, each under a hash of its description: a format that is
new or changed is measured on the spot. `python -m bitfold.evaluation.gaussian` writes the file anew.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bitfold.errors import FormatError
from bitfold.formats import FORMATS, AnyFormat
from bitfold.methods.quantize import quantize_tensor
from bitfold.system import progress

STORED = Path(__file__).with_name("gaussian.json")
SHAPE = (32, 4096)
SEED = 20260101
FIT = "mse"


@dataclass(frozen=True)
class FormatRow:
    """One format as people choose it.

    Args:
        name: for `--format`.
        bits: of a code.
        bpw: bits per weight where all blocks are full, as a number and as a fraction.
        levels: different values of a code; None for plain floats.
        low, high: smallest and largest value of a code at scale 1.
        sqnr_db: signal-to-noise ratio on a Gaussian, dB; None when the format can only be read; inf when exact.
    """

    name: str
    bits: float
    bpw: float
    bpw_exact: str
    levels: int | None
    low: float
    high: float
    sqnr_db: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; an infinite ratio is written as null with `exact` true."""
        exact = self.sqnr_db == math.inf
        return {**asdict(self), "sqnr_db": None if exact else self.sqnr_db, "exact": exact}


def format_table() -> list[FormatRow]:
    """All formats of the registry, in its order."""
    stored = _stored()
    missing = [f for f in FORMATS.values() if _key(f) not in stored]
    measured = dict(stored)
    with progress.bar("measuring formats", len(missing)) as bar:
        for format in missing:
            measured[_key(format)] = gaussian_sqnr(format)
            bar.advance(note=format.name)
    return [_row(format, measured[_key(format)]) for format in FORMATS.values()]


def gaussian_sqnr(format: AnyFormat, fit: str = FIT) -> float | None:
    """10 log10(|w|^2 / |w - wq|^2) over the sample; None for a format that cannot be written, inf for an exact one."""
    w = _sample()
    try:
        decoded = quantize_tensor(w, format, fit=fit).dequantize()
    except FormatError:
        return None
    noise = (w.double() - decoded.double()).square().sum().item()
    return 10 * math.log10(w.double().square().sum().item() / noise) if noise > 0 else math.inf


def sqnr_of(format: AnyFormat, fit: str = FIT) -> float | None:
    """`gaussian_sqnr` with any fit; looked up where it is known."""
    known = _stored() if fit == FIT else {}
    key = _key(format)
    return known[key] if key in known else gaussian_sqnr(format, fit)


def write_stored() -> None:
    """Measure all formats again and write the file that travels with the package."""
    table = {_key(f): gaussian_sqnr(f) for f in FORMATS.values()}
    text = {key: "inf" if value == math.inf else value and round(value, 3) for key, value in table.items()}
    STORED.write_text(json.dumps(text, indent=0) + "\n", encoding="utf-8")


@cache
def _sample() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(SEED))


def _stored() -> dict[str, float | None]:
    if not STORED.is_file():
        return {}
    text = json.loads(STORED.read_text(encoding="utf-8"))
    return {key: None if value is None else float(value) for key, value in text.items()}


def _key(format: AnyFormat) -> str:
    text = json.dumps(format.describe(), sort_keys=True)
    return f"{format.name} {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _row(format: AnyFormat, sqnr: float | None) -> FormatRow:
    low, high = format.span
    bpw = Fraction(format.bpw)
    return FormatRow(format.name, float(format.bits), float(bpw), str(bpw), format.levels, low, high, sqnr)


if __name__ == "__main__":
    write_stored()
