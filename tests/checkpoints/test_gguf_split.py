"""GGUF models that bitfold writes in several files: the same tensors, found again from any part; none is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitfold.checkpoints import open_source
from bitfold.checkpoints.gguf.container import Laid, parts_bytes, plan_parts
from bitfold.checkpoints.gguf.file import GgufFile
from bitfold.checkpoints.gguf.parts import GgufParts
from bitfold.checkpoints.repack import repack
from bitfold.checkpoints.staging import parts_of, placed, publish
from bitfold.errors import CheckpointError
from bitfold.records.run_report import QuantizeReport
from bitfold.run.driver import quantize
from bitfold.run.options import OnTensor
from bitfold.system.tensorinfo import TensorInfo
from gguf_families import random_model

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*has no tokenizer")
LIMIT = 150_000  # a quarter of the model below, less than its embedding


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model") / "hf"
    random_model("llama", {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}).save_pretrained(place)
    return place


@pytest.fixture
def parts(folder: Path, tmp_path: Path) -> list[Path]:
    made = repack(folder, tmp_path / "m.gguf", "gguf:Q8_0", max_shard_bytes=LIMIT)
    found = sorted(tmp_path.iterdir())
    assert made.path == found[0]
    assert made.nbytes == sum(path.stat().st_size for path in found)
    return found


def tensors(path: Path) -> dict[str, bytes]:
    file = GgufParts(path)
    try:
        return {name: bytes(file.raw(tensor)) for name, tensor in file.tensors.items()}
    finally:
        file.close()


def test_parts_hold_what_one_file_holds(folder: Path, parts: list[Path], tmp_path: Path) -> None:
    whole = repack(folder, tmp_path / "whole.gguf", "gguf:Q8_0")
    assert len(parts) > 2
    assert [path.name for path in parts] == [f"m-{i + 1:05d}-of-{len(parts):05d}.gguf" for i in range(len(parts))]
    assert all(tensors(path) == tensors(whole.path) for path in parts)
    assert sum(p.stat().st_size for p in parts) <= whole.nbytes + parts_bytes(whole.nbytes, LIMIT)
    source = open_source(parts[0])
    assert source.config == open_source(whole.path).config
    source.close()


def test_each_part_says_which_it_is(parts: list[Path]) -> None:
    """Only the first has the metadata of the model; kinds of numbers are those that llama.cpp's loader insists on."""
    for i, path in enumerate(parts):
        file = GgufFile(path)
        said = {"split.no": i, "split.count": len(parts), "split.tensors.count": len(tensors(path))}
        assert file.metadata.items() >= said.items()
        assert (file.metadata.keys() == said.keys()) == (i > 0)
        held = [t.nbytes for t in file.tensors.values()]
        assert len(held) == 1 or sum(held) <= LIMIT
        file.close()
        raw = path.read_bytes()
        for typed in (b"split.no\x02", b"split.count\x02", b"split.tensors.count\x05"):
            assert typed + bytes(3) in raw


@pytest.mark.parametrize("missing", [0, 1, -1])
def test_a_part_that_is_missing(parts: list[Path], missing: int) -> None:
    parts[missing].unlink()
    with pytest.raises(CheckpointError, match=parts[missing].name):
        open_source(next(path for path in parts if path.exists()))


def test_parts_and_files_of_one_name_do_not_mix(folder: Path, parts: list[Path], tmp_path: Path) -> None:
    """A part of another model between one's own would be loaded with them."""
    before = {path: path.read_bytes() for path in parts}
    for limit in (None, LIMIT, 2 * LIMIT):
        with pytest.raises(CheckpointError, match="exists already"):
            repack(folder, tmp_path / "m.gguf", "gguf:Q4_0", max_shard_bytes=limit)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    repack(folder, tmp_path / "m2.gguf", "gguf:Q4_0", max_shard_bytes=LIMIT)


def test_one_file_where_one_is_enough(folder: Path, tmp_path: Path) -> None:
    made = repack(folder, tmp_path / "m.gguf", "gguf:Q8_0", max_shard_bytes=10**9)
    assert made.path == tmp_path / "m.gguf"
    file = GgufFile(made.path)
    assert not any(key.startswith("split") for key in file.metadata)
    file.close()


class Stopped(Exception):
    pass


def test_a_run_that_was_cut_short(folder: Path, tmp_path: Path) -> None:
    """It goes on in the files that are there; the result is that of one go."""

    def stop(report: object) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Stopped

    def run(name: str, limit: int = LIMIT, on_tensor: OnTensor | None = None) -> QuantizeReport:
        how = {"export": "gguf:Q4_0", "method": "rtn", "max_shard_bytes": limit, "on_tensor": on_tensor}
        return quantize(folder, tmp_path / name, **how)  # type: ignore[arg-type]

    whole, left = run("a.gguf"), 4
    assert whole.output == str(tmp_path / f"a-00001-of-{len(whole.files):05d}.gguf")
    assert whole.preflight["output_bytes"] == sum(path.stat().st_size for path in tmp_path.iterdir())
    with pytest.raises(Stopped):
        run("b.gguf", on_tensor=stop)
    with pytest.raises(CheckpointError, match="shard size"):
        run("b.gguf", 2 * LIMIT)
    again = run("b.gguf")
    assert [path.name for path in sorted(tmp_path.glob("b*"))] == [n.replace("model", "b") for n in whole.files]
    assert not list(tmp_path.glob(".b*"))
    for a, b in zip(parts_of(tmp_path / "a.gguf"), parts_of(tmp_path / "b.gguf"), strict=True):
        assert a.read_bytes() == b.read_bytes()
    assert Path(str(again.output)).is_file()


def test_names(tmp_path: Path) -> None:
    staged = "model-00002-of-00003.gguf"
    assert placed("model.gguf", tmp_path / "a.gguf", "model.gguf") == tmp_path / "a.gguf"
    assert placed(staged, tmp_path / "a.gguf", "model.gguf").name == "a-00002-of-00003.gguf"
    assert placed(staged, tmp_path / "a.Q4_K_M", "model.gguf").name == "a.Q4_K_M-00002-of-00003.gguf"
    for name in ("a-00001-of-00002.gguf", "a-b-00001-of-00002.gguf", "a.gguf", "a-1-of-2.gguf"):
        (tmp_path / name).touch()
    assert [path.name for path in parts_of(tmp_path / "a.gguf")] == ["a-00001-of-00002.gguf"]


def test_a_move_that_was_cut_short_is_ended(tmp_path: Path) -> None:
    aside = tmp_path / "aside"
    aside.mkdir()
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(b"moved")
    (aside / "model-00001-of-00002.gguf").write_bytes(b"left")
    assert publish(aside, tmp_path / "m.gguf", "model.gguf") == tmp_path / "m-00001-of-00002.gguf"
    assert not aside.exists()


def test_more_files_than_gguf_counts() -> None:
    laid = {str(i): Laid("f32", (1,), TensorInfo(torch.float32, (1,))) for i in range(65536)}
    with pytest.raises(CheckpointError, match="more than GGUF counts"):
        plan_parts("m.gguf", {}, laid, 4)
