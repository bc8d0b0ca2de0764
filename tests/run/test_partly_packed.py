"""A folder of which a part is packed: what is left can be quantized, and what is packed stays bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bitfold
import tiny_lm
from bitfold.checkpoints.bitfold_folder import QuantizedSource, stored_tensors
from bitfold.errors import CheckpointError
from bitfold.recipes.recipe import Recipe, Rule
from bitfold.records.record import read_record

FIRST = "re:model\\.layers\\.0\\..*"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm.folder(tmp_path_factory.mktemp("partly") / "source", tiny_lm.model())


def packed(source: Path, out: Path, *rules: Rule) -> Path:
    bitfold.quantize(source, out, recipe=Recipe(rules))
    return out


def fields(folder: Path, beginning: str) -> dict[str, torch.Tensor]:
    return {name: w.clone() for name, w in stored_tensors(folder) if name.startswith(beginning)}


def test_the_rest_is_quantized_and_the_first_part_stays(tmp_path: Path, source: Path) -> None:
    half = packed(source, tmp_path / "half", Rule(FIRST, "trellis-2", transform="hadamard"), Rule("*"))
    whole = tmp_path / "whole"
    report = bitfold.quantize(half, whole, format="int4-g32")
    before, after = QuantizedSource(half).entries, QuantizedSource(whole).entries
    assert before
    assert {name: after[name] for name in before} == before
    assert {e.format.name for name, e in after.items() if name not in before} == {"int4-g32"}
    old, new = fields(half, "model.layers.0."), fields(whole, "model.layers.0.")
    assert old.keys() == new.keys()
    assert all(torch.equal(w, new[name]) for name, w in old.items())
    stays = [t for t in report.tensors if t.reason == "packed already"]
    assert {t.format for t in stays} == {"trellis-2"}
    first = {t["tensor"]: t["error"] for t in read_record(half)["quantize"]["tensors"] if t["format"] is not None}
    assert {t.tensor: t.error for t in stays} == first
    assert all(error > 0 for error in first.values())
    assert bitfold.load(whole)(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def test_it_is_the_folder_of_one_run(tmp_path: Path, source: Path) -> None:
    """Rounding needs no data: two parts after each other, or both at once."""
    rules = Rule(FIRST, "int8"), Rule("*", "int4-g32")
    once = packed(source, tmp_path / "once", *rules)
    half = packed(source, tmp_path / "half", rules[0], Rule("*"))
    twice = packed(half, tmp_path / "twice", rules[1])
    one, two = fields(once, ""), fields(twice, "")
    assert one.keys() == two.keys()
    assert all(torch.equal(w, two[name]) for name, w in one.items())


def test_what_is_left_is_calibrated_behind_the_part_that_is_packed(tmp_path: Path, source: Path) -> None:
    half = packed(source, tmp_path / "half", Rule(FIRST, "int2-g32"), Rule("*"))
    text = tmp_path / "text.txt"
    text.write_text(tiny_lm.TEXT, encoding="utf-8")
    done = bitfold.quantize(half, tmp_path / "whole", format="int4-g32", method="gptq", calibration=str(text))
    solved = [t for t in done.tensors if t.output_error is not None]
    assert solved
    assert not any(t.tensor.startswith("model.layers.0.") for t in solved)


def test_a_folder_with_nothing_left_is_refused(tmp_path: Path, source: Path) -> None:
    whole = packed(source, tmp_path / "whole", Rule("*", "int8"))
    with pytest.raises(CheckpointError, match="is quantized already"):
        bitfold.quantize(whole, tmp_path / "again", format="int4-g32")
    with pytest.raises(CheckpointError, match="is quantized already"):
        bitfold.quantize(whole, tmp_path / "again.gguf", export="gguf:Q4_K_M")
    assert not (tmp_path / "again").exists()
