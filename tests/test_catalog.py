"""Methods by name: every entry makes rules, and options replace parts of it."""

from __future__ import annotations

import pytest

from bitfold.calibrated import Calibration, settings
from bitfold.catalog import METHODS, Method, find_method
from bitfold.errors import UsageError
from bitfold.options import choose_recipe
from bitfold.recipe import Rule

entries = pytest.mark.parametrize(("name", "method"), METHODS.items(), ids=METHODS.keys())


@entries
def test_every_method_makes_rules(name: str, method: Method) -> None:
    """For each of its numbers of bits; plain integers where it has no formats of its own."""
    for bits in method.formats or (2, 4, 8):
        (rule,) = choose_recipe(solver=name, bits=bits).rules
        assert rule.solver == method.solver
        assert rule.format == method.formats.get(bits, rule.format)


@entries
def test_paper_and_text(name: str, method: Method) -> None:
    """Whoever reads the list learns what it is and whose it is."""
    assert method.what
    assert method.paper or name == "rtn"
    assert method.needs_text == (settings(name, None, 4, None, 0.5, None) is not None)


def test_what_the_names_mean() -> None:
    """By hand."""
    assert choose_recipe(solver="quip-sharp").rules == (Rule("*", "e8p", "ldlq", "mse", "hadamard", "float"),)
    assert choose_recipe(solver="llm-int8").rules == (Rule("*", "int8", act="int8-mixed:6.0"),)
    assert choose_recipe(solver="nf4").rules == (Rule("*", "nf4-dq"),)
    assert choose_recipe(solver="hqq", bits=3).rules == (Rule("*", "int3-affine-g64", fit="hqq"),)
    assert choose_recipe(solver="hqq", bits=3, group_size=32).rules[0].format == "int3-affine-g32"
    assert choose_recipe(solver="quip", bits=2).rules[0].format == "int2-affine"
    assert choose_recipe(bits=4).rules == (Rule("*", "int4-asym-g64"),)


def test_options_replace_choices() -> None:
    """Any part of a method."""
    (rule,) = choose_recipe(solver="quip", format="nf4", transform="none", fit="absmax").rules
    assert rule == Rule("*", "nf4", "ldlq", "absmax", "none", "float")
    assert choose_recipe(solver="llm-int8", act="int8-mixed:4").rules[0].act == "int8-mixed:4"


def test_what_is_refused() -> None:
    """Unknown names, bits that a method has no format for, nothing to go by, too much to go by."""
    with pytest.raises(UsageError, match="unknown method 'quipp'"):
        choose_recipe(solver="quipp", bits=2)
    with pytest.raises(UsageError, match="formats of 2 bits, not 3"):
        choose_recipe(solver="quip-sharp", bits=3)
    for options in ({"solver": "hqq"}, {}, {"bits": 4, "format": "nf4"}):
        with pytest.raises(UsageError, match="choose one of bits"):
            choose_recipe(**options)
    assert find_method("rtn").solver == "rtn"


def test_calibration_options_reach_methods() -> None:
    """The number of samples is not lost when no text is named."""
    assert settings("quip", None, 4, 64, 0.25, False) == Calibration(nsamples=4, seqlen=64, drift=0.25, fisher=False)
    assert settings("hqq", None, 4, None, 0.5, None) is None
    assert settings(None, None, 4, None, 0.5, None) is None
