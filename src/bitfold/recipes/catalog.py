"""Methods by the names of the field: which solver, fit, transform and formats each name stands for.

A method is a few choices that multiply, so an entry is a line, and any of its choices can be replaced by an option:
`--method quip --format nf4` is QuIP on NF4. Methods with a damping take it after a colon: `gptq:0.05`; `signround:200`
takes its steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bitfold.errors import UsageError
from bitfold.methods.solvers import get_solver
from bitfold.recipes.scheme import DEFAULTS, Scheme, read_scheme


@dataclass(frozen=True)
class Method:
    """What a name stands for.

    Args:
        what: in a line.
        choices: solver, fit, transform, act, prune where they are not rtn, mse, none, float, none.
        formats: the format for each number of bits; empty = the plain integers of `--bits`.
        paper: who proposed it.
        corrects: whether the corrections of `Calibration` (drift, token weights) are on where nobody says; without, the
            method is what its paper says.
        time: for a billion weights on a laptop, in a word.
        seqlen: tokens of a calibration window where nobody says.
    """

    what: str
    choices: Mapping[str, str] = field(default_factory=dict)
    formats: Mapping[int, str] = field(default_factory=dict)
    paper: str = ""
    corrects: bool = True
    time: str = "minutes"
    seqlen: int | None = None

    @property
    def solver(self) -> str:
        """What chooses its codes, by name, see SOLVERS."""
        return self.choices.get("solver", DEFAULTS["solver"])

    @property
    def needs_text(self) -> bool:
        """Whether it is calibrated."""
        return self._scheme.needs_text

    @property
    def _scheme(self) -> Scheme:
        return read_scheme("int8", **self.choices)  # any format will do

    @property
    def gradients(self) -> str:
        """Whether gradients are taken: "no", "optional" (token weights) or "yes"."""
        if self._scheme.solver.tunes_blocks:
            return "yes"
        return "optional" if self.needs_text and self.corrects else "no"

    @property
    def prunes(self) -> bool:
        """Whether it makes zeros, and so may leave the numbers otherwise as they are."""
        return "prune" in self.choices

    def format(self, bits: int | None) -> str | None:
        """The format for so many bits; where the method knows only one number of bits, that one is the default.

        Raises:
            UsageError: the method has no format of so many bits.
        """
        if not self.formats:
            return "bf16" if self.prunes and bits is None else None
        if bits is None:
            return next(iter(self.formats.values())) if len(self.formats) == 1 else None
        if bits not in self.formats:
            known = ", ".join(str(b) for b in self.formats)
            raise UsageError(f"this method has formats of {known} bits, not {bits}", hint="or name a --format")
        return self.formats[bits]


def _affine(*bits: int, group: str = "") -> dict[int, str]:
    return {b: f"int{b}-affine{group}" for b in bits}


AUTO = "auto"  # not a method: lets bitfold choose one, see auto.py
_ROTATED = {"solver": "ldlq", "transform": "hadamard"}
METHODS: dict[str, Method] = {
    "rtn": Method("each weight to the nearest code", time="seconds"),
    "hqq": Method(
        "scales and zero points that make large errors rare, by half-quadratic splitting",
        {"fit": "hqq"},
        _affine(*range(1, 9), group="-g64"),
        "Badri and Shaji 2023",
        time="seconds",
    ),
    "nf4": Method(
        "levels at the quantiles of a normal distribution, scales quantized again (QLoRA's base format)",
        formats={4: "nf4-dq"},
        paper="Dettmers et al. 2023, arXiv 2305.14314",
        time="seconds",
    ),
    "llm-int8": Method(
        "8-bit weights and activations, activation columns with outliers in floating point",
        {"act": "int8-mixed:6.0"},
        {8: "int8"},
        "Dettmers et al. 2022, arXiv 2208.07339",
        time="seconds",
    ),
    "smoothquant": Method(
        "8-bit weights and activations, large activation channels moved into the weights",
        {"fit": "absmax", "transform": "smooth:0.5", "act": "int8"},
        {8: "int8"},
        "Xiao et al. 2022, arXiv 2211.10438",
        corrects=False,
    ),
    "awq": Method(
        "weights scaled by what their inputs weigh, ranges clipped for the output's sake",
        {"fit": "clip", "transform": "awq"},
        paper="Lin et al. 2023, arXiv 2306.00978",
        corrects=False,
    ),
    "gptq": Method(
        "errors fed forward under the Hessian of the inputs, large inputs first",
        {"solver": "gptq"},
        paper="Frantar et al. 2022, arXiv 2210.17323",
        corrects=False,
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
        {**_ROTATED, "act": "auto"},
        {b: f"trellis-{b}" for b in range(1, 5)},
        "Tseng et al. 2024, arXiv 2406.11235",
    ),
    "signround": Method(
        "rounding and ranges learned by signs of gradients, block by block (AutoRound)",
        {"solver": "signround"},
        paper="Cheng et al. 2023, arXiv 2309.05516",
        corrects=False,
        time="hours",
        seqlen=512,
    ),
    "wanda": Method(
        "zeros where weight times input is small: a share, or N of M (--prune wanda:2:4)",
        {"prune": "wanda:0.5"},
        paper="Sun et al. 2023, arXiv 2306.11695",
        corrects=False,
    ),
    "sparsegpt": Method(
        "zeros chosen and made up for as errors are fed forward: a share, or N of M (--prune sparsegpt:2:4)",
        {"solver": "gptq", "prune": "sparsegpt:0.5"},
        paper="Frantar and Alistarh 2023, arXiv 2301.00774",
        corrects=False,
    ),
    "aqlm": Method(
        "sums of entries of learned codebooks, refined under the Hessian",
        {"solver": "aqlm"},
        {b: f"aqlm-{b}x8" for b in range(1, 5)},
        "Egiazarian et al. 2024, arXiv 2401.06118",
    ),
}


def find_method(name: str) -> Method:
    """The method of that name, which may end in a damping, gptq:0.05, or a number of steps, signround:200.

    Raises:
        UsageError: there is none, or it takes no number.
    """
    kind, colon, number = name.partition(":")
    method = METHODS.get(kind)
    if method is None:
        raise UsageError(f"unknown method {name!r}", hint=f"known methods: {AUTO}, {', '.join(METHODS)}")
    if not colon:
        return method
    solver = get_solver(method.solver)
    if not (solver.feeds_errors or solver.tunes_blocks):
        raise UsageError(f"unknown method {name!r}: {kind} takes no number", hint=f"--method {kind}")
    return replace(method, choices={**method.choices, "solver": solver.with_number(number).name})


def to_rows() -> list[dict[str, Any]]:
    """JSON-able: name, what, bits, data, gradients, time, paper, choices of each method."""
    return [
        {
            "name": name,
            "what": m.what,
            "bits": _bits(m),
            "data": m.needs_text,
            "gradients": m.gradients,
            "time": m.time,
            "paper": m.paper,
            "choices": dict(m.choices),
        }
        for name, m in METHODS.items()
    ]


def _bits(method: Method) -> str:
    known = sorted(method.formats or range(1, 9))
    return str(known[0]) if len(known) == 1 else f"{known[0]}-{known[-1]}"
