"""Importance matrices: both forms come back as they were written, the gguf package reads them, damage is told."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from bitfold.checkpoints.gguf.imatrix import Imatrix, Importance, read_imatrix, write_imatrix
from bitfold.errors import CheckpointError


def matrix() -> Imatrix:
    draw = torch.Generator().manual_seed(0)
    one, stack, costs, rows = (torch.rand(s, generator=draw) for s in ((8,), (3, 4), (8,), (5,)))
    entries = {"blk.0.ffn_up.weight": Importance(one, costs, rows), "blk.0.ffn_up_exps.weight": Importance(stack)}
    return Imatrix(entries, 1024, 512, ("some.txt",))


@pytest.mark.parametrize("name", ["m.gguf", "m.dat"])
def test_as_it_was_written(name: str, tmp_path: Path) -> None:
    written = matrix()
    write_imatrix(tmp_path / name, written)
    found = read_imatrix(tmp_path / name)
    assert found.entries.keys() == written.entries.keys()
    assert found.texts == ("some.txt",)
    for key, entry in written.entries.items():
        torch.testing.assert_close(found.entries[key].squares.flatten(), entry.squares.flatten())
    if name.endswith(".gguf"):
        assert (found.tokens, found.window) == (1024, 512)
        same = found.entries["blk.0.ffn_up.weight"]
        assert torch.equal(same.weights, written.entries["blk.0.ffn_up.weight"].costs)
        assert torch.equal(same.rows, written.entries["blk.0.ffn_up.weight"].rows)
        assert found.entries["blk.0.ffn_up_exps.weight"].squares.shape == (3, 4)


def test_the_gguf_package_reads_it(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    write_imatrix(tmp_path / "m.gguf", matrix())
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {"imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"} <= reader.fields.keys()
    sums = {t.name: t for t in reader.tensors}
    assert sums["blk.0.ffn_up_exps.weight.in_sum2"].data.shape == (3, 4)
    assert sums["blk.0.ffn_up_exps.weight.counts"].data.shape == (3, 1)
    assert float(sums["blk.0.ffn_up.weight.counts"].data.flat[0]) == 1024


def test_experts_that_no_token_was_sent_to(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "none")
    writer.add_type("imatrix")
    writer.add_tensor("a.in_sum2", torch.tensor([[4.0, 8.0], [0.0, 0.0]]).numpy())
    writer.add_tensor("a.counts", torch.tensor([[4.0], [0.0]]).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_imatrix(tmp_path / "m.gguf").entries["a"].squares.tolist() == [[1.0, 2.0], [1.0, 1.0]]


def old(*entries: bytes, count: int | None = None, end: bytes = b"") -> bytes:
    return struct.pack("<i", len(entries) if count is None else count) + b"".join(entries) + end


def entry(name: bytes, values: list[float], size: int | None = None, length: int | None = None) -> bytes:
    head = struct.pack("<i", len(name) if length is None else length) + name
    return (
        head + struct.pack("<ii", 2, len(values) if size is None else size) + struct.pack(f"<{len(values)}f", *values)
    )


def test_the_older_form_without_its_end(tmp_path: Path) -> None:
    (tmp_path / "m.dat").write_bytes(old(entry(b"a", [2.0, 4.0])))
    found = read_imatrix(tmp_path / "m.dat")
    assert found.entries["a"].squares.tolist() == [1.0, 2.0]
    assert found.texts == ()


WRONG = {
    "empty": b"",
    "no entries": old(),
    "a count beyond reason": old(entry(b"a", [1.0]), count=2**30),
    "more entries than there are": old(entry(b"a", [1.0]), count=2),
    "an entry twice": old(entry(b"a", [1.0]), entry(b"a", [1.0])),
    "a negative length": old(entry(b"a", [1.0], length=-1)),
    "a name beyond the end": old(entry(b"a", [1.0], length=200)),
    "values beyond the end": old(entry(b"a", [1.0], size=1000)),
    "a size beyond reason": old(entry(b"a", [1.0], size=2**31 - 1)),
    "no values": old(entry(b"a", [])),
    "a name that is no text": old(entry(b"\xff\xfe", [1.0])),
    "a negative square": old(entry(b"a", [-1.0])),
    "not a number": old(entry(b"a", [float("nan")])),
    "half a trailer": old(entry(b"a", [1.0]), end=b"\x01\x00\x00\x00\xff\xff\xff\x7f"),
}


@pytest.mark.parametrize("what", WRONG)
def test_damage_is_told(what: str, tmp_path: Path) -> None:
    (tmp_path / "m.dat").write_bytes(WRONG[what])
    with pytest.raises(CheckpointError):
        read_imatrix(tmp_path / "m.dat")


def test_a_model_is_no_importance_matrix(tmp_path: Path) -> None:
    from gguf_files import LLAMA, llama_tensors, write_gguf

    write_gguf(tmp_path / "m.gguf", "llama", llama_tensors(), LLAMA, {})
    with pytest.raises(CheckpointError, match="no importance matrix"):
        read_imatrix(tmp_path / "m.gguf")


def test_sums_without_counts(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "m.gguf", matrix())
    data = (tmp_path / "m.gguf").read_bytes().replace(b"ffn_up.weight.counts", b"ffn_up.weight.c0unts")
    (tmp_path / "n.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match="missing"):
        read_imatrix(tmp_path / "n.gguf")
