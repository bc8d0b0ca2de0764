"""Large tensors a few rows at a time: the same numbers as at once, and memory for a piece only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitfold
import bitfold.planning.row_slices
from bitfold.checkpoints.safetensors import SafetensorsSource
from bitfold.errors import CheckpointError


def model(folder: Path) -> Path:
    """Names that say what they are: a layer, a stack of experts, an embedding; nothing transformers knows."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "other", "architectures": ["Other"]}')
    g = torch.Generator().manual_seed(0)
    tensors = {
        "tok_embeddings.weight": torch.randn(700, 64, generator=g).bfloat16(),
        "blocks.0.ff.weight": torch.randn(1030, 64, generator=g).bfloat16(),
        "blocks.0.experts.up": torch.randn(6, 40, 64, generator=g).bfloat16(),
        "blocks.0.norm.weight": torch.ones(64),
    }
    tensors["blocks.0.ff.weight"][900] = 0
    tensors["blocks.0.ff.weight"][:, 5] = 0
    tensors["blocks.0.experts.up"][4, :, 7] = 0
    save_file(tensors, folder / "model.safetensors")
    return folder


FORMATS = ["int4-asym-g32", "int8", "nf4-dq", "int8-tensor", "mxfp4", "trellis-2", "bf16", "q8_0"]


@pytest.mark.filterwarnings("ignore:transformers does not have")
@pytest.mark.parametrize("format", FORMATS)
def test_pieces_are_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    """Where scales belong to rows; formats with a scale of the whole tensor are left in one piece."""
    source = model(tmp_path / "source")
    options: dict[str, Any] = {"format": format, "fit": "absmax"}
    whole = bitfold.quantize(source, tmp_path / "whole", **options)
    monkeypatch.setattr(bitfold.planning.row_slices, "WEIGHTS", 16500)
    assert bitfold.planning.row_slices.ranges((1030, 64)) == [
        (0, 256),
        (256, 512),
        (512, 768),
        (768, 1024),
        (1024, 1030),
    ]
    assert bitfold.planning.row_slices.ranges((6, 40, 64)) == [(0, 6)]
    monkeypatch.setattr(bitfold.planning.row_slices, "WEIGHTS", 6000)
    assert bitfold.planning.row_slices.ranges((6, 40, 64)) == [(0, 2), (2, 4), (4, 6)]
    parts = bitfold.quantize(source, tmp_path / "parts", **options)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    for one, other in zip(whole.tensors, parts.tensors, strict=True):
        assert one.flags == other.flags
        assert (one.error or 0) == pytest.approx(other.error or 0, rel=1e-9, abs=1e-15)
    flags = {t.tensor: " ".join(t.flags) for t in parts.tensors}
    assert "1 rows of zeros 1 columns of zeros" in flags["blocks.0.ff.weight"]
    assert "1 columns of zeros" in flags["blocks.0.experts.up"]


def test_rows_are_read_from_their_places(tmp_path: Path) -> None:
    """Any rows of any tensor; a file that has become shorter is an error."""
    folder = model(tmp_path / "source")
    source, tensors = SafetensorsSource(folder), load_file(folder / "model.safetensors")
    for name in ("blocks.0.ff.weight", "blocks.0.experts.up"):
        rows = torch.tensor([0, 3, len(tensors[name]) - 1])
        assert torch.equal(source.read_rows(name, rows), tensors[name][rows])
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="ended early"):
        source.read_rows("tok_embeddings.weight", torch.arange(700))
