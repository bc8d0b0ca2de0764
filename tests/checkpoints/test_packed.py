"""Weights that other programs packed decode to what the programs themselves decode them to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitfold.checkpoints import open_source
from bitfold.checkpoints.packed import PackedSource
from bitfold.qtensor import QTensor
from packed_files import NAMES, UP, golden, write_folder

WEIGHT = f"{UP}.weight"
# Where the program computes in fewer bits than 32, its numbers are ours rounded: so many of the fraction.
ROUNDED = {"ct-nvfp4": 8, "ct-mxfp4": 8}
# Kinds of which the numbers are not those of a format of ours.
DECODED = ("gptq-4-order", "bnb-fp4", "bnb-int8", "hqq-2-axis0", "mlx")


def opened(name: str, path: Path) -> PackedSource:
    tensors, _, config = golden(name)
    found = open_source(write_folder(path / "m", tensors, config))
    assert isinstance(found, PackedSource)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_decodes_to_the_floats_of_its_program(name: str, tmp_path: Path) -> None:
    """Bit for bit, but for what the program rounds: as many bits as its own dtype has."""
    w, expected = opened(name, tmp_path).read(WEIGHT), golden(name)[1]
    if bits := ROUNDED.get(name):
        bound = expected.float().abs() * 2.0**-bits * 3  # a scale, a factor and their product are rounded
        assert bool(((w - expected.float()).abs() <= bound).all())
    else:
        assert torch.equal(w, expected.float())


@pytest.mark.parametrize("name", NAMES)
def test_is_a_source_of_plain_names(name: str, tmp_path: Path) -> None:
    """One tensor under the name of the model, every byte accounted for, no word of quantization left."""
    source = opened(name, tmp_path)
    tensors, expected, _ = golden(name)
    assert source.names() == [WEIGHT]
    assert source.info(WEIGHT).shape == tuple(expected.shape)
    assert source.read(WEIGHT).dtype == torch.float32
    assert sum(source.stored_bytes().values()) == source.data_bytes() == sum(w.nbytes for w in tensors.values())
    stored = source.quantized()[WEIGHT]
    assert stored.bpw == pytest.approx(8 * source.data_bytes() / expected.numel())
    assert source.program in stored.format
    assert not [key for key in source.config if "quant" in key or "compress" in key]


@pytest.mark.parametrize("name", NAMES)
def test_is_one_of_our_formats_where_the_numbers_are(name: str, tmp_path: Path) -> None:
    """`packed` gives fields that decode to the very same numbers."""
    source = opened(name, tmp_path)
    packed = source.packed(WEIGHT)
    assert isinstance(packed, QTensor) != name.startswith(DECODED)
    w = packed.dequantize() if isinstance(packed, QTensor) else packed
    turned = name == "mxfp4"  # gpt-oss has inputs before outputs
    assert torch.equal(w.mT if turned else w, source.read(WEIGHT))
