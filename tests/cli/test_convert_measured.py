"""`bitfold convert --measure`: what a conversion loses is said before the output gets its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli_runs import Bitfold, keys_are_documented


@pytest.mark.filterwarnings("ignore")
def test_what_is_lost_is_said_and_limited(bitfold: Bitfold, model: Path, tmp_path: Path) -> None:
    said = bitfold("convert", model, tmp_path / "a.gguf", "--to", "gguf:Q4_0", "--measure", "--json")
    keys_are_documented("convert", said.json)
    assert said.json["kl_mean"] > 0
    assert 0 < said.json["top1"] <= 1
    assert "relative square error" in said.err
    assert said.err.index("KL ") > said.err.index("relative square error")
    judged = bitfold("eval", tmp_path / "a.gguf", "--reference", model, "--max-tokens", "2048", "--json").json
    assert judged["kl_mean"] == pytest.approx(said.json["kl_mean"], rel=1e-3)
    done = bitfold("convert", model, tmp_path / "b.gguf", "--to", "gguf:Q4_0", "--max-kl", "1e-9")
    assert done.code == 7
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.filterwarnings("ignore")
def test_an_exact_one_is_not_measured(bitfold: Bitfold, model: Path, tmp_path: Path) -> None:
    bitfold("quantize", model, "-o", tmp_path / "q", "--format", "int4-g32")
    said = bitfold("convert", tmp_path / "q", tmp_path / "g", "--to", "gptq", "--measure", "--json").json
    assert said["exact"]
    assert said["kl_mean"] is None
    assert bitfold("convert", model, tmp_path / "p", "--measure").code == 2
