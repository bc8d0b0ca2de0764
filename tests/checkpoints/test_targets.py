"""Every kind of checkpoint that can be written: what is written is read back, in any order, once or again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from bitfold.checkpoints import open_source
from bitfold.checkpoints.schema import QUANTIZATION, Entry, describe, own_quantization, read_entries
from bitfold.checkpoints.targets import ENGINES, GGUF, TARGETS, open_target
from bitfold.errors import CheckpointError, UsageError
from bitfold.formats import FORMATS, get_format
from bitfold.methods.quantize import quantize_tensor
from bitfold.system.tensorinfo import TensorInfo
from bitfold.transforms import Hadamard

# Those that hold tensors of any name; a GGUF file holds a model that it knows (test_gguf_writing.py), folders of
# other engines hold integers alone (test_packed_writing.py).
FOLDERS = [kind for kind in TARGETS if kind not in (GGUF, *ENGINES)]
TENSORS = {
    "a.weight": torch.arange(24, dtype=torch.float32).view(4, 6).bfloat16(),
    "b.weight": torch.linspace(-1, 1, 33),
    "c": torch.tensor(3.0, dtype=torch.float16),
    "d.weight": torch.arange(10).view(5, 2).half(),
}
INFOS = {name: TensorInfo(w.dtype, tuple(w.shape)) for name, w in TENSORS.items()}
CONFIG = {"model_type": "llama", "dtype": "float32"}


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("size", [1, 100, 1 << 20], ids=lambda size: f"shards of {size}")
def test_what_is_written_is_read(kind: str, size: int, tmp_path: Path) -> None:
    """In any order, in pieces, twice; the hash is that of the bytes; a second opening finds what is there."""
    target = open_target(kind, tmp_path, size)
    target.layout(INFOS)
    for name in [*reversed(TENSORS), "a.weight"]:
        w = TENSORS[name]
        said = target.write(name, w.split(3) if w.dim() else [w])
        raw = bytes(w.contiguous().reshape(-1).view(torch.uint8).tolist())
        assert said == {name: target.digest(name)} == {name: hashlib.sha256(raw).hexdigest()}
    again = open_target(kind, tmp_path, size)
    again.layout(INFOS)
    assert [again.digest(name) for name in TENSORS] == [target.digest(name) for name in TENSORS]
    again.finish(CONFIG)
    source = open_source(tmp_path)
    assert set(source.names()) == set(TENSORS)
    assert all(torch.equal(source.read(name), w) for name, w in TENSORS.items())
    assert source.config == CONFIG
    assert all((tmp_path / file).is_file() for file in again.files)
    assert source.unread() == []


@pytest.mark.parametrize("kind", FOLDERS)
def test_what_was_not_planned(kind: str, tmp_path: Path) -> None:
    target = open_target(kind, tmp_path, 1 << 20)
    target.layout(INFOS)
    for wrong in (TENSORS["a.weight"][:2], TENSORS["a.weight"].float(), TENSORS["a.weight"].repeat(2, 1)):
        with pytest.raises(CheckpointError, match="planned"):
            target.write("a.weight", [wrong])


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("format", ["int4-asym-g32", "nf4-dq", "trellis-3", "q4_k"])
def test_packed_weights(kind: str, format: str, tmp_path: Path) -> None:
    """Whatever a kind calls and cuts them, they are read as they were packed; sizes are known without a folder."""
    transform = Hadamard(256, 0)
    q = quantize_tensor(transform.weights(torch.randn(64, 256)), format)
    entry = Entry(q.format, (64, 256), "int8-static", False, transform)
    contents = {**INFOS, "w.weight": entry}
    target = open_target(kind, tmp_path, 1000)
    target.layout(contents)
    fields = {**q.fields, "act_scale": torch.ones(1)}
    for wrong in (q.fields, {**fields, "more": torch.ones(1)}):
        with pytest.raises(CheckpointError, match="planned"):
            target.pack("w.weight", wrong)
    hashes = target.pack("w.weight", fields)
    for name, w in TENSORS.items():
        hashes |= target.write(name, [w])
    assert {name: target.digest(name) for name in hashes} == hashes
    stored = target.stored(contents)
    assert target.held() == {name: info.nbytes for name, info in stored.items()}
    assert hashes.keys() == stored.keys()
    assert sum((tmp_path / f).stat().st_size for f in target.files) == open_target(kind, tmp_path / "none", 1000).size(
        contents
    )
    target.finish(CONFIG, describe({"w.weight": entry}, {}))
    source = open_source(tmp_path)
    assert set(source.names()) == contents.keys()
    torch.testing.assert_close(source.read("w.weight"), transform.inverse(q.dequantize()))


def test_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown kind of checkpoint"):
        open_target("onnx", tmp_path, 1)


ENTRIES = [Entry(FORMATS[name], (128, 256)) for name in FORMATS if not FORMATS[name].plain]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.format.name)
def test_entries_are_read_as_they_were_written(entry: Entry) -> None:
    """Through JSON: format, shape, activations, orientation, transform, and so the layout of every field."""
    more = Entry(entry.format, entry.shape, "int8", transposed=True, transform=Hadamard(256, 7))
    said = json.loads(json.dumps(describe({"w": entry, "v": more}, {"norm": "kept"}, ["old"], recipe=[])))
    assert own_quantization({QUANTIZATION: said}, "here") == said
    found = read_entries(said)
    assert {name: e.to_dict() for name, e in found.items()} == said["tensors"]
    assert found["w"].layout() == entry.layout()
    assert found["v"].layout() == more.layout()
    assert (said["kept"], said["unused"]) == ({"norm": "kept"}, ["old"])


NONSENSE: list[dict[str, object]] = [
    *({"shape": shape} for shape in ([0, 8], [8], "8", [8, -8], [2**40, 2**40], None)),
    *({"format": format} for format in ("none", [])),
    {"transform": {"kind": "hadamard", "size": 64, "seed": 1}},
    {"act": "int99"},
]


@pytest.mark.parametrize("change", NONSENSE, ids=str)
def test_entries_that_make_no_sense(change: dict[str, object]) -> None:
    said = describe({"w": Entry(get_format("int4"), (128, 256))}, {})
    said["tensors"]["w"] |= change
    with pytest.raises((CheckpointError, UsageError)):
        read_entries(said)


def test_newer_versions_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"version 2 of the format.*pip install"):
        own_quantization({QUANTIZATION: {**describe({}, {}), "version": 2}}, "here")
    assert own_quantization({QUANTIZATION: {"quant_method": "gptq"}}, "here") is None
