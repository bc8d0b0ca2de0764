"""`bitfold quantize`: what it prints, writes and hands on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from bitfold import errors
from bitfold.calibration.options import Calibration
from bitfold.recipes.options import MethodOptions
from bitfold.run import driver
from bitfold.run.options import Request, RunOptions
from cli_runs import Bitfold, keys_are_documented


def test_quantize(bitfold: Bitfold, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dry = bitfold("quantize", model, "--bits", 3, "--method", "rtn", "-o", out, "--dry-run", "--json").json
    assert not out.exists()
    result = bitfold(
        "quantize",
        model,
        "--bits",
        3,
        "--method",
        "rtn",
        "-o",
        out,
        "--ignore",
        "re:.*down_proj",
        "--ignore",
        "q_proj",
        "--json",
    )
    keys_are_documented("quantize", result.json)
    kept = {t["tensor"] for t in result.json["tensors"] if t["format"] is None}
    assert {"model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight"} < kept
    assert (out / "config.json").is_file()
    assert dry["output"] is None
    assert dry["bytes_after"] < result.json["bytes_after"] < result.json["bytes_before"]
    again = bitfold("quantize", model, "--bits", 3, "-o", out)
    assert again.code == 3
    assert "exists already" in again.err


def test_quantize_in_words(bitfold: Bitfold, model: Path, tmp_path: Path) -> None:
    result = bitfold("quantize", model, "--format", "nf4", "-o", tmp_path / "out", "--tensors")
    assert result.code == 0
    assert re.search(r"^model\.layers\.1\.mlp\.up_proj\.weight +nf4 +96x64 +4\.250", result.out, re.M)
    assert re.search(r"^nf4 +14 +4\.267", result.out, re.M)
    assert re.search(rf"^written to +{re.escape(str(tmp_path / 'out'))}$", result.out, re.M)


def test_quantize_options_reach_the_driver(bitfold: Bitfold, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def record(request: Request, options: RunOptions) -> None:
        seen[:] = (request, options)
        raise errors.UsageError("enough")

    monkeypatch.setattr(driver, "run", record)
    bitfold(
        "quantize", "org/m", "-o", "o", "--format", "nf4", "--group-size", 32, "--fit", "hqq", "--method", "rtn",
        "--act", "int8", "--ignore", "a", "--ignore", "b", "--seed", 7, "--max-shard-size", "2GiB", "--revision", "v1",
        "--upload-repo", "me/q", "--transform", "none", "--max-memory", "1GB", "--strict", "--restart", "--events", "e",
    )  # fmt: skip
    wanted = MethodOptions(None, "nf4", 32, "hqq", "rtn", "none", "int8", ignore=("a", "b"))
    how = RunOptions(7, 2 << 30, 10**9, restart=True, strict=True, events=Path("e"), revision="v1", upload_repo="me/q")
    assert seen == [Request("org/m", Path("o"), wanted), how]
    bitfold(
        "quantize", "org/m", "-o", "o", "--bits", 3, "--method", "ldlq", "--calibration", "a.txt", "--nsamples", 4,
        "--seqlen", 64, "--drift", 0.25, "--no-fisher", "--no-refit", "--dry-run", "--prune", "wanda:0.5",
    )  # fmt: skip
    text = Calibration("a.txt", 4, 64, 0.25, False, refit=False)
    assert seen[0] == Request("org/m", Path("o"), MethodOptions(3, method="ldlq", prune="wanda:0.5"), text)
    assert seen[1] == RunOptions(dry_run=True)
