"""Tensors of a safetensors folder, read one at a time: only their own bytes are mapped."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitfold.checkpoints.headers import DTYPES
from bitfold.checkpoints.safetensors import SafetensorsSource
from bitfold.errors import CheckpointError

SHAPES = [(), (0,), (1,), (3, 5), (2, 0, 4), (4, 129), (2, 3, 7)]


def folder(path: Path, tensors: dict[str, torch.Tensor], *, pad: int = 0) -> Path:
    """With so many spaces more in the header, so that no tensor begins where its dtype would like it."""
    path.mkdir()
    (path / "config.json").write_text("{}")
    file = path / "model.safetensors"
    save_file(tensors, file)
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    file.write_bytes(struct.pack("<Q", length + pad) + raw[8 : 8 + length] + b" " * pad + raw[8 + length :])
    return path


@pytest.mark.parametrize("pad", [0, 1, 4093])
def test_every_dtype_and_shape(pad: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in DTYPES.values():
        for shape in SHAPES:
            raw = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
            tensors[f"{dtype} {shape}"] = raw.view(dtype).reshape(shape)
    source = SafetensorsSource(folder(tmp_path / "m", tensors, pad=pad))
    expected = load_file(tmp_path / "m" / "model.safetensors")
    for name, tensor in tensors.items():
        found = source.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found, expected[name])]
        assert torch.equal(*bits), name
        if found.dim() == 2 and len(found) > 1:
            rows = source.read_rows(name, torch.tensor([0, len(found) - 1]))
            assert torch.equal(rows.view(torch.uint8), found[[0, -1]].view(torch.uint8))


def test_the_file_stays_as_it_is(tmp_path: Path) -> None:
    source = SafetensorsSource(folder(tmp_path / "m", {"w": torch.ones(64, 64)}))
    source.read("w").mul_(2)
    assert bool((source.read("w") == 1).all())


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    """An error with the name of the tensor; touching pages behind the end would kill the process."""
    source = SafetensorsSource(folder(tmp_path / "m", {"a": torch.ones(8), "w": torch.ones(64, 64)}))
    os.truncate(tmp_path / "m" / "model.safetensors", 1000)
    with pytest.raises(CheckpointError, match="cannot read tensor w"):
        source.read("w")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists the mappings of a process")
def test_many_tensors_at_once(tmp_path: Path) -> None:
    """Experts by the hundred are alive while they are put together: the file is not mapped as often."""
    source = SafetensorsSource(folder(tmp_path / "m", {f"experts.{i}": torch.ones(64, 65) for i in range(300)}))
    alive = [source.read(name) for name in source.names()]
    file = tmp_path / "m" / "model.safetensors"
    mapped = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file)):
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            mapped += last - first
    assert 0 < mapped <= file.stat().st_size + 2 * len(alive) * os.sysconf("SC_PAGE_SIZE")
