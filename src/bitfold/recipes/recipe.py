"""Recipes: which tensor gets what; the first rule that matches wins. A recipe is saved with the weights."""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bitfold.errors import BitfoldError, RecipeError
from bitfold.recipes.catalog import find_method
from bitfold.recipes.scheme import DEFAULTS, Scheme, read_scheme

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KEEP = "keep"
_CHOICES = ("fit", "transform", "act", "prune")  # what a rule may say otherwise than its method
_LARGEST = 1_000_000  # bytes of a file


@dataclass(frozen=True)
class Rule:
    """What to do with the tensors that match.

    Where fit, transform, act or prune are empty, the method says what they are; once made, a rule has them all.

    Args:
        match: "re:PATTERN" (a regular expression matched from the start), a glob with * or ?, or a name: the whole
            name or its last parts. All three are tried on the module's name and on the tensor's (with `.weight`).
        format: format name, or "keep" to leave the tensor as it is.
        method: see METHODS; `gptq:0.05` has a damping, `signround:200` a number of steps.
        fit: see FITS; the methods' own, mostly "mse".
        transform: "none"; "hadamard": a randomised rotation of the inputs, stored with the tensor; "smooth:0.5"
            (SmoothQuant) or "awq": factors of input channels, chosen by calibration.
        act: "float" (W8A16 and the like), "int8" (dynamic per-token int8 activations, W8A8), or "int8-mixed:6.0"
            (the same, columns with outliers of that size in floating point), or "int8-static" (one scale, calibrated);
            "auto": int8 or float, whichever calibration shows.
        prune: "none", "wanda:0.5", "sparsegpt:2:4" and the like: weights that become zero, see methods/pruning.py.

    Raises:
        FormatError, UsageError: an unknown format, method or fit.
        RecipeError: any other word that is unknown, or words that contradict each other.
    """

    match: str
    format: str = KEEP
    method: str = "rtn"
    fit: str = ""
    transform: str = ""
    act: str = ""
    prune: str = ""

    def __post_init__(self) -> None:
        if self.match.startswith("re:"):
            try:
                re.compile(self.match[3:])
            except (re.error, OverflowError, RecursionError) as error:
                raise RecipeError(f"{self.match!r} is not a regular expression: {error}") from error
        words = {**DEFAULTS, **find_method(self.method).choices}
        words |= {key: value for key in _CHOICES if (value := getattr(self, key))}
        for key in _CHOICES:
            object.__setattr__(self, key, words[key])
        # What the words mean is looked up here, once; a rule that keeps tensors is held to its words as well.
        scheme = read_scheme("int8" if self.keep else self.format, **words)
        object.__setattr__(self, "_scheme", None if self.keep else scheme)

    @property
    def scheme(self) -> Scheme | None:
        """What it does to a tensor; None = it keeps it."""
        found: Scheme | None = self.__dict__["_scheme"]
        return found

    @property
    def needs_text(self) -> bool:
        """Whether calibration is needed to follow it."""
        return self.scheme is not None and self.scheme.needs_text

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
        method = "gptq"

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
    def of(cls, format: str, *, method: str = "rtn", **choices: str) -> Recipe:
        """One format for everything that is quantized by default; `choices`: fit, transform, act, prune, see `Rule`."""
        return cls((Rule("*", format, method, **choices),))

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


__all__ = ["KEEP", "Recipe", "Rule"]
