"""The table of formats: errors on Gaussian weights that are stored are those that are measured."""

from __future__ import annotations

import json
import math

import pytest

from bitfold.formats import FORMATS
from bitfold.methods.gaussian import FIT, STORED, format_table, gaussian_sqnr


def test_stored_format_measurements_are_true() -> None:
    """A few of the numbers that travel with the package, measured again; every listed format has one."""
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    from bitfold.methods.gaussian import _key

    assert {_key(f) for f in FORMATS.values()} == set(stored), "run python -m bitfold.evaluation.gaussian"
    for name in ("bf16", "int8", "int2-g64", "nf4"):
        assert gaussian_sqnr(FORMATS[name]) == pytest.approx(stored[_key(FORMATS[name])], abs=0.05)
    assert FIT == "mse"


def test_format_table_is_sane() -> None:
    rows = {row.name: row for row in format_table()}
    assert rows["int8"].levels == 256
    assert rows["ternary"].levels == 3
    assert rows["nf4"].bpw_exact == "17/4"
    assert rows["fp32"].sqnr_db == math.inf
    assert rows["fp32"].to_dict()["exact"] is True
    for row in rows.values():
        # no format beats the rate-distortion bound of a Gaussian, 6.02 dB a bit
        assert row.sqnr_db is None or row.sqnr_db == math.inf or row.sqnr_db < 6.0206 * row.bpw
        json.dumps(row.to_dict(), allow_nan=False)
