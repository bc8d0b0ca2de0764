"""From the options of a command to the rules of a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from bitfold.errors import FormatError, UsageError
from bitfold.formats import get_format
from bitfold.methods.solvers import get_solver
from bitfold.recipes.catalog import AUTO, find_method
from bitfold.recipes.recipe import Recipe

DEFAULT_GROUP = 64
_FINE = 256  # levels


def choose_recipe(
    *,
    bits: int | None = None,
    format: str | None = None,
    group_size: int | None = None,
    fit: str | None = None,
    method: str | None = None,
    transform: str | None = None,
    act: str | None = None,
    prune: str | None = None,
    ignore: Iterable[str] = (),
    recipe: Recipe | str | Path | None = None,
) -> Recipe:
    """The recipe that a set of options means.

    Args:
        bits: 1..8: integers; 8 with one scale a row, 2 to 7 with scale and zero point for each group of 64, 1 with
            a scale for each group of 64. Methods with formats of their own (see METHODS) take those.
        format: a format name instead of bits.
        group_size: weights that share a scale; -1 or 0 = one scale a row.
        fit: see FITS; default: the method's, mostly "mse"; with feedback on 256 levels "minmax".
        method: see METHODS; default "rtn".
        transform: "none", "hadamard", "smooth:0.5" or "awq"; default: the method's.
        act: "float", "int8" or "int8-mixed:6.0"; default: the method's, mostly "float".
        prune: "wanda:0.5", "sparsegpt:2:4" and the like; default: the method's, mostly "none".
        ignore: patterns of tensors to keep.
        recipe: a Recipe or a TOML file instead of all but `ignore`.

    Raises:
        UsageError: options that contradict each other, or none at all.
    """
    if recipe is not None:
        options = {
            "--bits": bits,
            "--format": format,
            "--group-size": group_size,
            "--fit": fit,
            "--transform": transform,
        }
        options |= {"--method": method, "--act": act, "--prune": prune}
        if said := [name for name, value in options.items() if value is not None]:
            raise UsageError(f"the recipe already says what {', '.join(said)} would say", hint="drop one of them")
        loaded = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        return loaded.ignoring(ignore)
    known = find_method(method or "rtn")
    own = known.format(bits) if format is None else None
    if (own or format or bits) is None or (format is not None and bits is not None):
        raise UsageError(
            "choose one of bits (--bits) and format (--format)", hint="for example --bits 4 or --format nf4"
        )
    name = own or format or _format_for_bits(bits)
    if group_size is not None:
        name = _with_group(name, group_size)
    asked = {"fit": fit, "transform": transform, "act": act, "prune": prune}
    given = {key: value for key, value in asked.items() if value is not None}
    choices = {**_fit_of({**known.choices, **given}, name), **given}
    return Recipe.of(name, method=method or "rtn", **choices).ignoring(ignore)


def _fit_of(choices: Mapping[str, str], format: str) -> dict[str, str]:
    """With error feedback and levels so fine that rounding hardly counts, what is clipped counts (docs/log.md)."""
    grid = get_format(format).grid
    fine = grid is not None and grid.uniform and grid.levels >= _FINE
    fed = get_solver(choices.get("solver", "rtn")).feeds_errors and choices.get("transform", "none") == "none"
    return {"fit": "minmax"} if fine and fed and "fit" not in choices else {}


def leaves_the_choice(bits: int | None, method: str | None, others: Iterable[object]) -> bool:
    """Whether a set of options says how many bits and leaves the method to bitfold."""
    return method == AUTO or (method is None and bits is not None and all(option is None for option in others))


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
