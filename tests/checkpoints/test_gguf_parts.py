"""A model in several GGUF files is read as one; what is missing or belongs elsewhere is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitfold.checkpoints import convert, open_source
from bitfold.checkpoints.inspection import inspect
from bitfold.errors import CheckpointError
from gguf_files import LLAMA, llama_tensors, write_gguf

COUNT = 3


def split(folder: Path, seed: int = 0, stem: str = "m", **changes: Any) -> list[Path]:
    """A one-layer Llama in three parts, as llama.cpp's gguf-split writes them."""
    tensors, paths = llama_tensors(seed), []
    for part in range(COUNT):
        mine = {name: w for i, (name, w) in enumerate(tensors.items()) if i % COUNT == part}
        facts = {"split.no": part, "split.count": COUNT, "split.tensors.count": len(tensors), **changes}
        metadata = {**(LLAMA if part == 0 else {}), **facts}
        paths.append(write_gguf(folder / f"{stem}-{part + 1:05d}-of-{COUNT:05d}.gguf", "llama", mine, metadata))
    return paths


def whole(folder: Path, seed: int = 0) -> Path:
    return write_gguf(folder / "whole.gguf", "llama", llama_tensors(seed), LLAMA)


def same(path: Path, expected: Path) -> None:
    one, other = open_source(path), open_source(expected)
    assert sorted(one.names()) == sorted(other.names())
    for name in other.names():
        assert torch.equal(one.read(name), other.read(name)), name
    rows = torch.tensor([1, 5])
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(one.read_rows(name, rows), other.read(name)[rows])
    assert (one.config, one.data_bytes()) == (other.config, other.data_bytes())
    assert sorted(one.stored_bytes().items()) == sorted(other.stored_bytes().items())
    one.close(), other.close()


def test_whichever_part_is_named_all_are_read(tmp_path: Path):
    parts, expected = (
        split(tmp_path),
        whole(tmp_path / "elsewhere") if (tmp_path / "elsewhere").mkdir() is None else None,
    )
    assert expected is not None
    for part in parts:
        same(part, expected)
        assert len(open_source(part).fingerprint()) == len(open_source(part).files) == COUNT
    assert len(inspect(parts[1]).tensors) == len(llama_tensors())
    assert len(inspect(convert(parts[2], tmp_path / "folder")).tensors) == len(llama_tensors())


def test_the_folder_will_do_and_what_lies_beside_the_model_is_passed_over(tmp_path: Path):
    folder, other = tmp_path / "folder", tmp_path / "other"
    folder.mkdir(), other.mkdir()
    split(folder)
    same(folder, whole(other))
    write_gguf(
        folder / "mmproj-f16.gguf", "clip", {"v.weight": np.ones((2, 2), np.float32)}, {"general.type": "mmproj"}
    )
    same(folder, other)
    shutil.copy(other / "whole.gguf", folder / "again.gguf")
    with pytest.raises(CheckpointError, match=r"2 GGUF models: again.gguf, m-00001-of-00003.gguf") as caught:
        open_source(folder)
    assert "name the file" in caught.value.hint


def test_links_are_followed_to_the_others(tmp_path: Path):
    store, cache, expected = tmp_path / "store", tmp_path / "cache", tmp_path / "expected"
    for folder in (store, cache, expected):
        folder.mkdir()
    parts = split(store)
    (tmp_path / "model.gguf").symlink_to(parts[0])  # a name of the user's own
    same(tmp_path / "model.gguf", whole(expected))
    for i, part in enumerate(parts):  # as the Hub's cache: names are links to files called by their hashes
        part.rename(store / f"blob{i}")
        (cache / part.name).symlink_to(store / f"blob{i}")
    same(cache / parts[1].name, expected)


def damaged(change: Callable[[list[Path]], Path | None]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        parts = split(folder)
        return change(parts) or parts[0]

    return make


def _other_model(parts: list[Path]) -> None:
    tensors = dict(list(llama_tensors(1).items())[:4])
    facts = {"split.no": 1, "split.count": COUNT, "split.tensors.count": len(llama_tensors())}
    write_gguf(parts[1], "llama", tensors, facts)


DAMAGED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "one missing": (damaged(lambda p: p[1].unlink()), r"part 1 of 3, and m-00002-of-00003.gguf is missing"),
    "two missing": (damaged(lambda p: [p[0].unlink(), p[1].unlink()] and p[2]), r"part 3 of 3, and .*1.* are missing"),
    "renamed": (damaged(lambda p: p[0].rename(p[0].with_name("my.gguf"))), "its name does not say so"),
    "swapped": (damaged(lambda p: p[1].rename(p[2]) and None), "m-00002-of-00003.gguf is missing"),
    "misnamed": (damaged(lambda p: p[2].rename(p[1]) and p[1]), "its name says part 2 of 3, its metadata 3 of 3"),
    "copied": (damaged(lambda p: shutil.copy(p[0], p[2]) and None), "part 3 of 3, and its metadata says 1 of 3"),
    "other tensors": (damaged(_other_model), "is in m-0000[13]-of-00003.gguf as well"),
    "cut": (damaged(lambda p: p[1].write_bytes(p[1].read_bytes()[:-200]) and None), "00002.*truncated"),
    "wrong total": (lambda folder: split(folder, **{"split.tensors.count": 99})[0], "11 tensors, and 99 are announced"),
    "wrong count": (lambda folder: split(folder, **{"split.count": 7})[0], "part 1 of 3, its metadata 1 of 7"),
    "wrong number": (lambda folder: split(folder, **{"split.no": 1})[1], "part 1 of 3, and its metadata says 2"),
    "no number": (lambda folder: split(folder, **{"split.count": "3"})[0], "split.count is '3', not a number"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_what_does_not_belong_together_is_refused_by_name(case: str, tmp_path: Path):
    make, message = DAMAGED[case]
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        open_source(make(tmp_path))


def test_a_part_of_another_model_is_told_by_its_name(tmp_path: Path):
    split(tmp_path, **{"general.name": "one"})
    (tmp_path / "b").mkdir()
    parts = split(tmp_path / "b", seed=1, **{"general.name": "two"})
    shutil.copy(parts[1], tmp_path / parts[1].name)
    with pytest.raises(CheckpointError, match=r"part of another model: general.name is 'two', and 'one' in m-00001"):
        open_source(tmp_path)
