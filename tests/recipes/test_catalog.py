"""Methods by name: every entry makes rules, and options replace parts of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import bitfold
import tiny_lm
from bitfold.calibration.options import Calibration, settings
from bitfold.errors import BitfoldError, UsageError
from bitfold.recipes.catalog import METHODS, Method, find_method, to_rows
from bitfold.recipes.options import MethodOptions, choose_recipe
from bitfold.recipes.recipe import Recipe, Rule
from bitfold.recipes.scheme import Scheme, read_scheme

entries = pytest.mark.parametrize(("name", "method"), METHODS.items(), ids=METHODS.keys())


def chosen(**options: Any) -> Recipe:
    """The recipe of a set of options."""
    return choose_recipe(MethodOptions(**options))


def schemes(**options: Any) -> list[Scheme]:
    """What a set of options comes to."""
    return [rule.scheme for rule in chosen(**options).rules if rule.scheme is not None]


@entries
def test_every_method_makes_rules(name: str, method: Method) -> None:
    """For each of its numbers of bits; plain integers where it has no formats of its own."""
    for bits in method.formats or (2, 4, 8):
        (rule,) = chosen(method=name, bits=bits).rules
        assert rule.method == name
        assert rule.scheme is not None
        assert rule.scheme.solver.name == method.solver
        assert rule.format == method.formats.get(bits, rule.format)


@entries
def test_paper_and_text(name: str, method: Method) -> None:
    """Whoever reads the list learns what it is and whose it is."""
    assert method.what
    assert method.paper or name == "rtn"
    assert method.needs_text == (settings(name, None, 4, None, 0.5, None) is not None)
    assert method.gradients in (("no",) if not method.needs_text else ("no", "optional", "yes"))


def test_what_the_names_mean() -> None:
    """By hand."""
    assert schemes(method="quip-sharp") == [read_scheme("e8p", "ldlq", "mse", "hadamard")]
    assert schemes(method="llm-int8") == [read_scheme("int8", act="int8-mixed:6.0")]
    assert schemes(method="nf4") == [read_scheme("nf4-dq")]
    assert schemes(method="hqq", bits=3) == [read_scheme("int3-affine-g64", fit="hqq")]
    assert chosen(method="hqq", bits=3, group_size=32).rules[0].format == "int3-affine-g32"
    assert chosen(method="quip", bits=2).rules[0].format == "int2-affine"
    assert chosen(bits=4).rules == (Rule("*", "int4-asym-g64"),)


def test_options_replace_choices() -> None:
    """Any part of a method."""
    (rule,) = chosen(method="quip", format="nf4", transform="none", fit="absmax").rules
    assert rule.scheme == read_scheme("nf4", "ldlq", "absmax")
    assert chosen(method="llm-int8", act="int8-mixed:4").rules[0].act == "int8-mixed:4"


def test_what_is_refused() -> None:
    """Unknown names, bits that a method has no format for, nothing to go by, too much to go by."""
    with pytest.raises(UsageError, match="unknown method 'quipp'"):
        chosen(method="quipp", bits=2)
    with pytest.raises(UsageError, match="formats of 2 bits, not 3"):
        chosen(method="quip-sharp", bits=3)
    for options in ({"method": "hqq"}, {}, {"bits": 4, "format": "nf4"}):
        with pytest.raises(UsageError, match="choose one of bits"):
            chosen(**options)
    assert find_method("rtn").solver == "rtn"


def test_calibration_options_reach_methods() -> None:
    """The number of samples is not lost when no text is named."""
    assert settings("quip", None, 4, 64, 0.25, False) == Calibration(nsamples=4, seqlen=64, drift=0.25, fisher=False)
    assert settings("hqq", None, 4, None, 0.5, None) is None
    assert settings(None) == settings("auto") == Calibration()
    assert settings("gptq") == Calibration(drift=0.0, fisher=False)
    assert settings("gptq", drift=0.5, fisher=True) == Calibration(drift=0.5, fisher=True)


def test_every_method_of_the_field_is_there() -> None:
    """By the names people know them by; what they stand for, and dampings after a colon."""
    names = "rtn hqq nf4 ldlq gptq awq smoothquant llm-int8 quip quip-sharp aqlm signround trellis wanda sparsegpt"
    assert set(METHODS) == set(names.split())
    assert chosen(method="gptq:0.05", bits=4).rules == (Rule("*", "int4-asym-g64", "gptq:0.05"),)
    assert chosen(method="gptq", bits=8).rules == (Rule("*", "int8", "gptq", "minmax"),)
    assert chosen(method="gptq", bits=8, fit="mse").rules == (Rule("*", "int8", "gptq", "mse"),)
    assert chosen(method="gptq", bits=8, transform="hadamard").rules[0].fit == "mse"
    assert schemes(method="trellis:0.02", bits=2)[0].solver.name == "ldlq:0.02"
    assert schemes(method="awq", bits=4) == [read_scheme("int4-asym-g64", fit="clip", transform="awq")]
    smooth = read_scheme("int8", fit="absmax", transform="smooth:0.5", act="int8")
    assert schemes(method="smoothquant") == [smooth]
    assert schemes(method="wanda") == [read_scheme("bf16", prune="wanda:0.5")]
    both = chosen(method="gptq", bits=4, prune="sparsegpt:2:4").rules
    assert both == (Rule("*", "int4-asym-g64", "gptq", prune="sparsegpt:2:4"),)
    for wrong in ("gptq:zero", "gptq:-1", "rtn:0.1", "ldlq:0"):
        with pytest.raises(BitfoldError):
            chosen(method=wrong, bits=4)


def test_the_list_is_complete() -> None:
    """What `bitfold methods` prints."""
    rows = to_rows()
    assert [row["name"] for row in rows] == list(METHODS)
    keys = {"name", "what", "bits", "data", "gradients", "time", "paper", "choices"}
    assert all(set(row) == keys for row in rows)
    assert next(row for row in rows if row["name"] == "trellis")["bits"] == "1-4"


@pytest.mark.parametrize("given", [None, "auto"])
def test_when_the_choice_is_left_open(given: str | None) -> None:
    """Bits and nothing else, or "auto"."""
    assert MethodOptions(bits=4, method=given, act="float", ignore=("a",)).leaves_the_choice
    for other in ({"format": "nf4"}, {"fit": "mse"}, {"transform": "none"}, {"group_size": 32}, {"prune": "none"}):
        assert MethodOptions(bits=4, method=given, **other).leaves_the_choice == (given == "auto")
    assert not MethodOptions(bits=4, method="rtn").leaves_the_choice
    assert MethodOptions(method=given).leaves_the_choice == (given == "auto")


def test_auto(tmp_path: Path) -> None:
    """Calibrated trellis codes at few bits where the model runs on text; without a tokenizer, without."""
    whole = tiny_lm.folder(tmp_path / "whole", tiny_lm.model())
    bare = tmp_path / "bare"
    tiny_lm.model().save_pretrained(bare)  # type: ignore[operator]
    empty = tmp_path / "empty"
    tiny_lm.model().save_pretrained(empty)  # type: ignore[operator]
    (empty / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    encoder = tiny_lm.folder(tmp_path / "encoder", tiny_lm.encoder())
    for bits, folder, method, rounded, why in [
        (8, whole, "rtn", "rtn", "little"),
        (4, whole, "trellis", "trellis", "calibrated on 512 tokens"),
        (2, bare, "trellis", "rtn", "no tokenizer"),
        (2, empty, "trellis", "rtn", "no tokenizer"),
        (3, encoder, "trellis", "trellis", "calibrated on 512 tokens"),
    ]:
        calibration = Calibration(nsamples=4, seqlen=128)
        report = bitfold.quantize(folder, tmp_path / "out", bits=bits, calibration=calibration, dry_run=True)
        assert report.method.startswith(f"{method}: ")
        assert why in report.method
        assert report.recipe[0]["method"] == rounded
        assert report.recipe[0]["format"] == ("int8" if bits == 8 else f"trellis-{bits}")
    with pytest.raises(UsageError, match="choose one of bits"):
        bitfold.quantize(whole, tmp_path / "out", method="auto", dry_run=True)


def test_auto_with_the_activations_said(tmp_path: Path) -> None:
    """`--bits 3 --act float` still leaves the method open; any other choice does not."""
    model = tiny_lm.folder(tmp_path / "model", tiny_lm.model())
    options = {"bits": 3, "calibration": Calibration(nsamples=1, seqlen=64), "dry_run": True}
    report = bitfold.quantize(model, tmp_path / "out", act="float", **options)
    assert report.method.startswith("trellis: ")
    assert {rule["act"] for rule in report.recipe} <= {"float"}
    assert not bitfold.quantize(model, tmp_path / "out", fit="absmax", **options).method
