"""`bitfold quantize`: what it prints, writes and hands on."""

from __future__ import annotations

import json
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


def test_formats_for_a_size(bitfold: Bitfold, model: Path, text: Path, tmp_path: Path) -> None:
    matrix, out = tmp_path / "m.gguf", tmp_path / "out"
    bitfold("imatrix", model, "-o", matrix, "--nsamples", 4, "--seqlen", 32, "--calibration", text)
    given = ("quantize", model, "--method", "rtn", "--imatrix", matrix, "--calibration", text, "--seqlen", 32)
    result = bitfold(*given, "-o", out, "--target-size", "45kB", "--nsamples", 4)
    assert result.code == 0, result.err
    assert re.search(r"^plan for 45 kB: 4[34]\.?\d* kB, 3\.\d+ bits per weight$", result.err, re.M)
    assert re.search(r"^  trellis-\d \(embedding, head\) +\d tensors +\d+\.?\d* kB$", result.err, re.M)
    assert re.search(r"uniform plan", result.out)
    assert (out / "model.safetensors").stat().st_size <= 45_000
    again = bitfold("quantize", model, "--recipe", out / "bitfold_recipe.toml", "-o", tmp_path / "again", "--json")
    keys_are_documented("quantize", again.json)
    dry = bitfold(*given, "--target-bpw", 4, "--dry-run", "--json").json
    assert dry["preflight"]["output_bytes"] <= 4 * sum(t["bytes_before"] for t in dry["tensors"]) / 4 / 8


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--target-bpw", "2", "--bits", "4"), "a budget chooses what --bits would say"),
        (("--target-size", "1MB", "--format", "int4"), "a budget chooses what --format would say"),
        (("--target-size", "1MB", "--target-bpw", "3"), "said twice"),
        (("--target-size", "much"), "'much' is not a size"),
        (("--target-bpw", "0"), "make no sense"),
        (("--target-bpw", "nan"), "make no sense"),
        (("--target-bpw", "3", "--method", "gptq"), "not of gptq"),
        (("--target-bpw", "3", "--export", "gptq"), "in bitfold's own folders and in GGUF files"),
        (("--target-bpw", "3", "--imatrix", "none.gguf"), "cannot be opened"),
        (("--bits", "4", "--imatrix", "none.gguf"), "for a size"),
        (("--target-bpw", "0.5", "--method", "rtn", "--seqlen", "32", "--nsamples", "2"), "the smallest that can be"),
    ],
)
def test_sizes_that_are_none(
    bitfold: Bitfold, model: Path, text: Path, tmp_path: Path, wrong: tuple[str, ...], said: str
) -> None:
    more = () if "--export" in wrong or "--bits" in wrong else ("--calibration", text)
    result = bitfold("quantize", model, "-o", tmp_path / "out", *wrong, *more)
    assert said in result.err
    assert result.code in (2, 3)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".out.plan")]


def test_a_mix_of_texts(model: Path, tmp_path: Path, bitfold: Bitfold) -> None:
    """What was read is in the record, without folders; a share that is none is refused in words."""
    (tmp_path / "notes.txt").write_text("a note of some length\n" * 100, encoding="utf-8")
    options = ("--format", "int4-g32", "--method", "gptq", "--nsamples", 4, "--seqlen", 32)
    mix = ("--calibration", f"{tmp_path / 'notes.txt'}:0.25", "--calibration", "code:0.75")
    assert bitfold("quantize", model, "-o", tmp_path / "out", *options, *mix).code == 0
    record = json.loads((tmp_path / "out" / "bitfold_report.json").read_text(encoding="utf-8"))
    assert record["quantize"]["calibration"]["text"] == "notes.txt:0.25 + code:0.75"
    wrong = bitfold("quantize", model, "-o", tmp_path / "no", *options, *mix, "--calibration", "default:0")
    assert wrong.code not in (0, 70)
    assert "no share of a mix" in wrong.err
