"""Weights cut for several processes: the parts decode to the parts of the whole, or it is refused."""

from __future__ import annotations

import pytest
import torch

from bitfold.errors import FormatError
from bitfold.methods.quantize import quantize_tensor
from bitfold.qtensor import QTensor, cut_columns, cut_rows


def made(name: str) -> QTensor:
    return quantize_tensor(torch.randn(512, 512, generator=torch.Generator().manual_seed(0)), name)


@pytest.mark.parametrize("name", ["int4-asym-g64", "int4-g64", "int8", "int3-g32", "fp8", "mxfp4", "nf4", "trellis-3"])
def test_rows(name: str) -> None:
    q = made(name)
    whole = q.dequantize()
    for first, stop in ((0, 256), (256, 512), (128, 384), (0, 512)):
        assert torch.equal(cut_rows(q, first, stop).dequantize(), whole[first:stop])


@pytest.mark.parametrize("name", ["int4-asym-g64", "int4-g64", "int4-affine-g64", "int8", "int3-g32", "fp8", "mxfp4"])
def test_columns(name: str) -> None:
    q = made(name)
    whole = q.dequantize()
    for first, stop in ((0, 256), (256, 512), (64, 448), (0, 512)):
        assert torch.equal(cut_columns(q, first, stop).dequantize(), whole[:, first:stop])


def test_refused_inside_of_what_belongs_together() -> None:
    """A scale for the tensor, tiles of a trellis, groups, bytes; columns of other formats than codes with scales."""
    for name, rows in (("int8-tensor", (0, 256)), ("trellis-3", (0, 24))):
        q = made(name)
        with pytest.raises(FormatError, match="cannot be taken alone"):
            cut_rows(q, *rows)
    for name, columns in (("int4-g64", (0, 96)), ("int3", (3, 512)), ("trellis-3", (0, 256)), ("nvfp4", (0, 256))):
        q = made(name)
        with pytest.raises(FormatError, match="cannot be taken alone"):
            cut_columns(q, *columns)
