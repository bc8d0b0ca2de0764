"""Recipes: which tensor gets what; the first rule that matches wins. A recipe is saved with the weights."""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from bitfold.errors import BitfoldError, RecipeError, UsageError
from bitfold.formats import get_format
from bitfold.methods.fits import CALIBRATED_FITS, get_fit
from bitfold.methods.pruning import read_sparsity
from bitfold.methods.solvers import get_solver, is_calibrated, is_feedback
from bitfold.transforms import transform_spec
from bitfold.transforms.activations import read_act

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KEEP = "keep"
_LARGEST = 1_000_000  # bytes of a file


@dataclass(frozen=True)
class Rule:
    """What to do with the tensors that match.

    Args:
        match: "re:PATTERN" (a regular expression matched from the start), a glob with * or ?, or a name: the whole
            name or its last parts. All three are tried on the module's name and on the tensor's (with `.weight`).
        format: format name, or "keep" to leave the tensor as it is.
        solver: see SOLVERS.
        fit: see FITS.
        transform: "none"; "hadamard": a randomised rotation of the inputs, stored with the tensor; "smooth:0.5"
            (SmoothQuant) or "awq": factors of input channels, chosen by calibration.
        act: "float" (W8A16 and the like), "int8" (dynamic per-token int8 activations, W8A8), or "int8-mixed:6.0"
            (the same, columns with outliers of that size in floating point), or "int8-static" (one scale, calibrated);
            "auto": int8 or float, whichever calibration shows.
        prune: "none", "wanda:0.5", "sparsegpt:2:4" and the like: weights that become zero, see methods/pruning.py.
    """

    match: str
    format: str = KEEP
    solver: str = "rtn"
    fit: str = "mse"
    transform: str = "none"
    act: str = "float"
    prune: str = "none"

    def __post_init__(self) -> None:
        try:
            if self.match.startswith("re:"):
                re.compile(self.match[3:])
            plain = self.format != KEEP and get_format(self.format).plain
            get_solver(self.solver)
            get_fit(self.fit)
        except (re.error, OverflowError, RecursionError) as error:
            raise RecipeError(f"{self.match!r} is not a regular expression: {error}") from error
        if plain and (self.transform, self.act) != ("none", "float"):
            raise RecipeError(f"{self.format} stores ordinary tensors, which know no transform and no activation type")
        try:
            read_act(self.act)
            transform_spec(self.transform)
            sparsity = read_sparsity(self.prune)
        except UsageError as error:
            raise RecipeError(error.what, hint=error.hint) from error
        if sparsity is not None and sparsity.kind == "sparsegpt" and not is_feedback(self.solver):
            raise RecipeError("sparsegpt needs a solver that feeds errors forward", hint="ldlq or gptq")
        if self.act == "int8-static" and self.transform == "hadamard":
            raise RecipeError("static activation scales are known only without a rotation", hint="act int8")

    @property
    def needs_text(self) -> bool:
        """Whether calibration is needed to follow it."""
        if self.keep:
            return False
        data = (
            self.prune != "none"
            or transform_spec(self.transform).diagonal
            or read_act(self.act).static
            or self.fit in CALIBRATED_FITS
        )
        return data or is_calibrated(self.solver)

    @property
    def keep(self) -> bool:
        """Whether this rule leaves tensors alone."""
        return self.format == KEEP

    def matches(self, tensor: str) -> bool:
        """Whether the rule is about that tensor."""
        module = tensor.removesuffix(".weight")
        if self.match.startswith("re:"):
            return any(re.match(self.match[3:], name) for name in (tensor, module))
        if any(c in self.match for c in "*?["):
            return any(fnmatch.fnmatchcase(name, self.match) for name in (tensor, module))
        return any(name == self.match or name.endswith("." + self.match) for name in (tensor, module))


@dataclass(frozen=True)
class Recipe:
    """An ordered list of rules. Reads and writes TOML:

        [[rule]]
        match = "re:.*down_proj"
        format = "int8"

        [[rule]]
        match = "*"
        format = "int4-asym-g64"
        fit = "mse"

    Default exceptions (output heads, routers, embeddings) come after the first rules that name them, see `find`.
    """

    rules: tuple[Rule, ...]

    def find(self, tensor: str, *, default_keep: bool = False) -> Rule | None:
        """The first rule that matches, or None.

        Args:
            tensor: name of the tensor.
            default_keep: the tensor belongs to a kind that is kept unless a rule asks for it by more than "*".
        """
        for rule in self.rules:
            if rule.matches(tensor) and not (default_keep and rule.match in ("*", "re:.*")):
                return rule
        return None

    def ignoring(self, patterns: Iterable[str]) -> Recipe:
        """The recipe with keep rules for these patterns in front."""
        return Recipe((*(Rule(p) for p in patterns), *self.rules))

    @classmethod
    def of(
        cls,
        format: str,
        *,
        fit: str = "mse",
        solver: str = "rtn",
        transform: str = "none",
        act: str = "float",
        prune: str = "none",
    ) -> Recipe:
        """One format for everything that is quantized by default."""
        return cls((Rule("*", format, solver, fit, transform, act, prune),))

    @classmethod
    def loads(cls, text: str, *, where: str | None = None) -> Recipe:
        """Read TOML; RecipeError with the place of the mistake."""
        try:
            data = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # TOMLDecodeError, and numbers or nesting beyond all reason
            raise RecipeError(f"not a TOML file: {error}", where=where) from error
        rules = data.get("rule")
        if set(data) != {"rule"} or not isinstance(rules, list) or not rules:
            raise RecipeError("a recipe is a list of [[rule]] tables and nothing else", where=where)
        return cls(tuple(_read_rule(rule, f"{where or 'recipe'}, rule {i}") for i, rule in enumerate(rules, 1)))

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a TOML file."""
        try:
            if Path(path).stat().st_size > _LARGEST:
                raise RecipeError(f"is larger than {_LARGEST} bytes, so it is no recipe", where=str(path))
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot be read: {error}", where=str(path)) from error
        return cls.loads(text, where=str(path))

    def dumps(self) -> str:
        """The recipe as TOML."""
        return "\n".join(_write_rule(rule) for rule in self.rules)

    def to_dict(self) -> list[dict[str, Any]]:
        """JSON-able rules."""
        return [asdict(rule) for rule in self.rules]


def _read_rule(data: Any, where: str) -> Rule:
    known = {f.name for f in fields(Rule)}
    if not isinstance(data, dict) or "match" not in data:
        raise RecipeError("a rule needs `match`", where=where)
    if extra := set(data) - known:
        raise RecipeError(f"unknown keys {sorted(extra)}", where=where, hint=f"a rule has {', '.join(sorted(known))}")
    if wrong := [key for key, value in data.items() if not isinstance(value, str)]:
        raise RecipeError(f"{wrong} must be text", where=where)
    try:
        return Rule(**data)
    except BitfoldError as error:
        raise RecipeError(error.what, where=where, hint=error.hint) from error


def _write_rule(rule: Rule) -> str:
    lines = ["[[rule]]"]
    for key, value in asdict(rule).items():
        if rule.keep and key not in ("match", "format"):
            continue
        lines.append(f"{key} = {_quote(value)}")
    return "\n".join(lines) + "\n"


def _quote(text: str) -> str:
    """TOML basic string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'


__all__ = ["KEEP", "Recipe", "Rule", "replace"]
