"""From the options of a command to the rules of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from bitfold.errors import FormatError, UsageError
from bitfold.formats import get_format
from bitfold.methods.solvers import get_solver
from bitfold.recipes.catalog import AUTO, find_method
from bitfold.recipes.recipe import Recipe

DEFAULT_GROUP = 64
_FINE = 256  # levels


@dataclass(frozen=True)
class MethodOptions:
    """How weights are to be quantized, as options say it; None = nothing is said.

    Args:
        bits: 1..8: integers; 8 with one scale a row, 2 to 7 with scale and zero point for each group of 64, 1 with
            a scale for each group of 64. Methods with formats of their own (see METHODS) take those.
        format: a format name instead of bits.
        group_size: weights that share a scale; -1 or 0 = one scale a row.
        fit: see FITS; default: the method's, mostly "mse"; with feedback on 256 levels "minmax".
        method: see METHODS; "auto", or bits alone (but for act and ignore), leaves the choice to bitfold.
        transform: "none", "hadamard", "smooth:0.5" or "awq"; default: the method's.
        act: "float", "int8" or "int8-mixed:6.0"; default: the method's, mostly "float".
        prune: "wanda:0.5", "sparsegpt:2:4" and the like; default: the method's, mostly "none".
        ignore: patterns of tensors to keep.
        recipe: a Recipe or a TOML file instead of all but `ignore`.
        keep_embeddings: leave embeddings and output heads as they are; else bits (but no format and no recipe) put them
            into 8 bits, see planning/tables.py.
    """

    bits: int | None = None
    format: str | None = None
    group_size: int | None = None
    fit: str | None = None
    method: str | None = None
    transform: str | None = None
    act: str | None = None
    prune: str | None = None
    ignore: tuple[str, ...] = ()
    recipe: Recipe | str | Path | None = None
    keep_embeddings: bool = False

    @property
    def leaves_the_choice(self) -> bool:
        """Whether they say how many bits and leave the method to bitfold."""
        others = (self.format, self.group_size, self.fit, self.transform, self.prune, self.recipe)
        alone = self.method is None and self.bits is not None and all(option is None for option in others)
        return self.method == AUTO or alone

    @property
    def packs_tables(self) -> bool:
        """Whether embeddings and output heads are quantized with the rest."""
        return self.bits is not None and not self.keep_embeddings

    @property
    def shortens_groups(self) -> bool:
        """Whether rows shorter than a group get one scale a row: nobody asked for just these groups."""
        return self.bits is not None and self.group_size is None

    def given(self) -> dict[str, int | str | Recipe | Path]:
        """What is said, by the flags of the command line, without `ignore` and `keep_embeddings`."""
        named = [f.name for f in fields(self) if f.name not in ("ignore", "keep_embeddings")]
        said = {f"--{name.replace('_', '-')}": getattr(self, name) for name in named}
        return {flag: value for flag, value in said.items() if value is not None}

    def with_choice(self, choice: Mapping[str, str | None]) -> MethodOptions:
        """With a method, and what it needs where nothing else is said; bits as well, if the choice has a format."""
        open = {key for key in choice if key in ("method", "bits") or getattr(self, key) is None}
        chosen: dict[str, Any] = {key: choice[key] for key in open}
        return replace(self, **chosen)


def choose_recipe(options: MethodOptions) -> Recipe:
    """The recipe that options mean; where they leave the method open, rounding to nearest.

    Raises:
        UsageError: options that contradict each other, or none at all.
        FormatError, RecipeError: unknown words.
    """
    if options.recipe is not None:
        if said := [flag for flag in options.given() if flag != "--recipe"]:
            raise UsageError(f"the recipe already says what {', '.join(said)} would say", hint="drop one of them")
        loaded = options.recipe if isinstance(options.recipe, Recipe) else Recipe.load(options.recipe)
        return loaded.ignoring(options.ignore)
    method = "rtn" if options.method in (None, AUTO) else str(options.method)
    known, bits, format = find_method(method), options.bits, options.format
    own = known.format(bits) if format is None else None
    if (own or format or bits) is None or (format is not None and bits is not None):
        raise UsageError(
            "choose one of bits (--bits) and format (--format)", hint="for example --bits 4 or --format nf4"
        )
    name = own or format or _format_for_bits(bits)
    if options.group_size is not None:
        name = _with_group(name, options.group_size)
    asked = {"fit": options.fit, "transform": options.transform, "act": options.act, "prune": options.prune}
    given = {key: value for key, value in asked.items() if value is not None}
    choices = {**_fit_of({**known.choices, **given}, name), **given}
    return Recipe.of(name, method=method, **choices).ignoring(options.ignore)


def _fit_of(choices: Mapping[str, str], format: str) -> dict[str, str]:
    """With error feedback and levels so fine that rounding hardly counts, what is clipped counts (docs/log.md)."""
    grid = get_format(format).grid
    fine = grid is not None and grid.uniform and grid.levels >= _FINE
    fed = get_solver(choices.get("solver", "rtn")).feeds_errors and choices.get("transform", "none") == "none"
    return {"fit": "minmax"} if fine and fed and "fit" not in choices else {}


def _format_for_bits(bits: int | None) -> str:
    if bits is None or not 1 <= bits <= 8:
        raise UsageError(f"cannot quantize to {bits} bits", where="--bits", hint="1 to 8")
    if bits == 8:
        return "int8"
    # One bit has two levels: they sit on both sides of zero, which needs no zero point.
    return f"int{bits}-g{DEFAULT_GROUP}" if bits == 1 else f"int{bits}-asym-g{DEFAULT_GROUP}"


def _with_group(name: str, group_size: int) -> str:
    if group_size < -1:
        raise UsageError(f"a group of {group_size} weights makes no sense", hint="a positive number, or -1 for the row")
    double = name.endswith("-dq")
    parts = [p for p in name.removesuffix("-dq").split("-") if p not in ("row", "tensor") and not _is_group(p)]
    scoped = "-".join([*parts, f"g{group_size}" if group_size > 0 else "row"]) + ("-dq" if double else "")
    try:
        get_format(scoped)
    except FormatError as error:
        get_format(name)  # a name that is unknown in itself is told as such
        raise UsageError(f"the groups of {name} have a size of their own", where="--group-size") from error
    return scoped


def _is_group(part: str) -> bool:
    return part.startswith("g") and part[1:].isdigit()
