"""Words become objects once: what a rule's method stands for, what is equal, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import bitfold
import tiny_lm
from bitfold.errors import BitfoldError, RecipeError, UsageError
from bitfold.formats import FORMATS, get_format, scaled_by_row
from bitfold.methods.fits import FITS
from bitfold.methods.solvers import SOLVERS, get_solver
from bitfold.recipes.catalog import METHODS
from bitfold.recipes.options import MethodOptions, choose_recipe
from bitfold.recipes.recipe import Recipe, Rule
from bitfold.recipes.scheme import DEFAULTS, read_scheme
from bitfold.transforms.activations import read_act


@pytest.mark.parametrize("name", METHODS)
def test_a_method_means_the_same_in_a_rule_and_as_an_option(name: str) -> None:
    """`method = "awq"` in a recipe is `--method awq`, whatever the method is made of."""
    (given,) = choose_recipe(MethodOptions(method=name, format="aqlm-2x8" if name == "aqlm" else "int4-asym-g64")).rules
    read = Recipe.loads(f'[[rule]]\nmatch = "*"\nformat = "{given.format}"\nmethod = "{name}"\n').rules[0]
    assert read == given
    assert read.scheme == given.scheme
    assert Recipe.loads(Recipe((read,)).dumps()).rules == (read,)
    assert Rule(**Recipe((read,)).to_dict()[0]) == read


def test_what_a_rule_says_goes_before_its_method() -> None:
    """Also where it says that there is none."""
    assert Rule("*", "int4", "awq", transform="none", fit="absmax").scheme == read_scheme("int4", "rtn", "absmax")
    assert Rule("*", "int4", "ldlq", transform="none").scheme == read_scheme("int4", "ldlq")
    assert Rule("*", "int4", "gptq").scheme == read_scheme("int4", "gptq")


def test_schemes_are_equal_whatever_rule_they_come_from() -> None:
    """Layers of one input that have them are solved together."""
    one, other = Rule("*q_proj", "int4-g32", "gptq:0.05"), Rule("re:.*k_proj", "int4-g32", "gptq:0.05")
    assert one.scheme == other.scheme
    assert len({one.scheme, other.scheme, Rule("*", "int4-g32", "gptq").scheme}) == 2
    assert Rule("lm_head").scheme is None
    assert not Rule("lm_head", method="gptq").needs_text


@pytest.mark.parametrize("name", SOLVERS)
def test_a_line_says_what_a_solver_needs(name: str) -> None:
    """Formats without it are refused by name; the others are not."""
    solver = SOLVERS[name]
    assert solver.name == name
    assert solver.needs_hessian == read_scheme("int8", name).needs_text
    assert solver.tunes_blocks == bool(solver.steps)
    for format in FORMATS.values():
        wrong = solver.misfit(format)
        assert wrong is None or wrong.startswith(f"{format.name} ")
    assert solver.misfit(get_format("bf16")) is None or solver.requires is not None


def test_numbers_after_a_colon() -> None:
    """A damping where errors are fed forward, steps where blocks are tuned, nothing elsewhere."""
    assert get_solver("gptq:0.05").damp == 0.05
    assert get_solver("signround:200").steps == 200
    assert get_solver(SOLVERS["rtn"]) is SOLVERS["rtn"]
    for wrong in ("rtn:1", "aqlm:0.1", "gptq:", "signround:0", "signround:few", "ldlq:nan", "gtpq"):
        with pytest.raises(UsageError):
            get_solver(wrong)
        with pytest.raises(BitfoldError):
            Rule("*", "int4", wrong)


def test_only_fits_that_want_a_hessian_want_text() -> None:
    """By their own line."""
    assert [name for name in FITS if read_scheme("int4", fit=name).needs_text] == ["clip"]


@pytest.mark.parametrize("text", ["float", "int8", "int8-static", "int8-mixed:4.5", "auto"])
def test_activations_go_by_the_name_that_is_stored(text: str) -> None:
    """What a checkpoint stores is what a recipe said."""
    assert read_act(text).name == text
    assert DEFAULTS["act"] == "float"


@pytest.mark.parametrize(
    ("name", "row"), [("int4-asym-g64", "int4-asym-row"), ("nf4", "nf4-row"), ("nf4-dq", "nf4-row"), ("int8", "int8")]
)
def test_one_scale_a_row_instead_of_groups(name: str, row: str) -> None:
    """What rows shorter than a group get; a format without such a form stays itself."""
    assert scaled_by_row(get_format(name)).scale == get_format(row).scale
    assert scaled_by_row(get_format("q4_k")) is get_format("q4_k")


def test_a_key_of_earlier_recipes_is_told() -> None:
    """`solver` was what is now `method`."""
    with pytest.raises(RecipeError, match="unknown keys") as error:
        Recipe.loads('[[rule]]\nmatch = "*"\nformat = "int4"\nsolver = "gptq"\n')
    assert "method" in str(error.value.hint)


def test_a_folder_with_an_earlier_recipe_loads(tmp_path: Path) -> None:
    """What a recipe was called by is not what reading depends on."""
    source, out = tiny_lm.folder(tmp_path / "source", tiny_lm.model()), tmp_path / "out"
    bitfold.quantize(source, out, format="int4-g32")
    config = out / "config.json"
    text = config.read_text(encoding="utf-8")
    assert '"method": "rtn"' in text
    config.write_text(text.replace('"method": "rtn"', '"solver": "rtn"'), encoding="utf-8")
    bitfold.load(out)
