"""Methods by the names of the field: which solver, fit, transform and formats each name stands for.

A method is a few choices that multiply, so an entry is a line, and any of its choices can be replaced by an option:
`--method quip --format nf4` is QuIP on NF4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bitfold.errors import UsageError
from bitfold.solvers import SOLVERS, is_calibrated


@dataclass(frozen=True)
class Method:
    """What a name stands for.

    Args:
        what: in a line.
        choices: solver, fit, transform, act where they are not rtn, mse, none, float.
        formats: the format for each number of bits; empty = the plain integers of `--bits`.
        paper: who proposed it.
    """

    what: str
    choices: Mapping[str, str] = field(default_factory=dict)
    formats: Mapping[int, str] = field(default_factory=dict)
    paper: str = ""

    @property
    def solver(self) -> str:
        """The solver."""
        return self.choices.get("solver", "rtn")

    @property
    def needs_text(self) -> bool:
        """Whether it is calibrated."""
        return is_calibrated(self.solver)

    def format(self, bits: int | None) -> str | None:
        """The format for so many bits; where the method knows only one number of bits, that one is the default.

        Raises:
            UsageError: the method has no format of so many bits.
        """
        if not self.formats:
            return None
        if bits is None:
            return next(iter(self.formats.values())) if len(self.formats) == 1 else None
        if bits not in self.formats:
            known = ", ".join(str(b) for b in self.formats)
            raise UsageError(f"this method has formats of {known} bits, not {bits}", hint="or name a --format")
        return self.formats[bits]


def _affine(*bits: int, group: str = "") -> dict[int, str]:
    return {b: f"int{b}-affine{group}" for b in bits}


_ROTATED = {"solver": "ldlq", "transform": "hadamard"}
METHODS: dict[str, Method] = {
    "rtn": Method("each weight to the nearest code"),
    "hqq": Method(
        "scales and zero points that make large errors rare, by half-quadratic splitting",
        {"fit": "hqq"},
        _affine(*range(1, 9), group="-g64"),
        "Badri and Shaji 2023",
    ),
    "nf4": Method(
        "levels at the quantiles of a normal distribution, scales quantized again (QLoRA's base format)",
        formats={4: "nf4-dq"},
        paper="Dettmers et al. 2023, arXiv 2305.14314",
    ),
    "llm-int8": Method(
        "8-bit weights and activations, activation columns with outliers in floating point",
        {"act": "int8-mixed:6.0"},
        {8: "int8"},
        "Dettmers et al. 2022, arXiv 2208.07339",
    ),
    "ldlq": Method(
        "errors fed forward under the Hessian of rotated inputs", _ROTATED, paper="Chee et al. 2023, arXiv 2307.13304"
    ),
    "quip": Method(
        "rotated inputs, error feedback, uniform levels a row",
        _ROTATED,
        {**_affine(1, 2, 3, 4, 5, 6, 7), 8: "int8"},
        "Chee et al. 2023, arXiv 2307.13304",
    ),
    "quip-sharp": Method(
        "rotated inputs, error feedback in blocks of eight, points of the E8 lattice",
        _ROTATED,
        {2: "e8p"},
        "Tseng et al. 2024, arXiv 2402.04396",
    ),
    "trellis": Method(
        "rotated inputs, error feedback, trellis codes",
        _ROTATED,
        {b: f"trellis-{b}" for b in range(1, 5)},
        "Tseng et al. 2024, arXiv 2406.11235",
    ),
    "aqlm": Method(
        "sums of entries of learned codebooks, refined under the Hessian",
        {"solver": "aqlm"},
        {b: f"aqlm-{b}x8" for b in range(1, 5)},
        "Egiazarian et al. 2024, arXiv 2401.06118",
    ),
}


def find_method(name: str) -> Method:
    """The method of that name; the name of a solver alone means that solver.

    Raises:
        UsageError: neither.
    """
    if name in METHODS:
        return METHODS[name]
    if name in SOLVERS:
        return Method(f"the solver {name}", {"solver": name})
    raise UsageError(f"unknown method {name!r}", hint=f"known methods: {', '.join(METHODS)}")
