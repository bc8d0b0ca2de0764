"""ggml's block types against the `gguf` package: the same bytes, the same floats, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitfold.errors import FormatError, WeightError
from bitfold.formats.base import Params
from bitfold.formats.families import ggml_layouts as layouts
from bitfold.formats.families.ggml import GGML, Ggml, writable
from bitfold.formats.families.ggml_points import points
from bitfold.formats.families.ggml_vectors import VECTORS, even_signs
from bitfold.qtensor import QTensor

gguf = pytest.importorskip("gguf", reason="the gguf package (dev extra) is the reference")

REFERENCE_WRITES = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "ggml_mxfp4", "tq2_0"]
K_QUANTS = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]


def reference_type(name):
    return gguf.GGMLQuantizationType[name.removeprefix("ggml_").upper()]


def reference_decode(raw, name):
    with np.errstate(all="ignore"):  # random bytes hold infinities and NaNs
        return gguf.quants.dequantize(raw, reference_type(name))


def random_bytes(format, rows, blocks, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, blocks * format.block[1]), dtype=np.uint8)


def gaussian(rows, k, seed=0, scale=0.02):
    return np.random.default_rng(seed).standard_normal((rows, k)).astype(np.float32) * np.float32(scale)


def same_floats(a, b):
    """Bit for bit, except that any NaN equals any NaN."""
    nan = np.isnan(a)
    bits_a, bits_b = np.ascontiguousarray(a).view(np.uint32), np.ascontiguousarray(b).view(np.uint32)
    return np.array_equal(nan, np.isnan(b)) and np.array_equal(bits_a[~nan], bits_b[~nan])


@pytest.mark.parametrize("format", GGML.values(), ids=lambda f: f.name)
def test_sizes_are_the_reference_s(format: Ggml):
    assert gguf.constants.GGML_QUANT_SIZES[reference_type(format.name)] == format.block
    assert format.bpw * format.block[0] == 8 * format.block[1]
    assert format.layout((3, 2 * format.block[0]))["blocks"].nbytes * 8 == format.bpw * 6 * format.block[0]


@pytest.mark.parametrize("format", GGML.values(), ids=lambda f: f.name)
def test_random_bytes_decode_bit_for_bit(format: Ggml):
    raw = random_bytes(format, 40, 3)
    shape = (40, 3 * format.block[0])
    out = format.decode({"blocks": torch.from_numpy(raw)}, shape)
    assert out.dtype == torch.float32
    assert same_floats(out.numpy(), reference_decode(raw, format.name))


@pytest.mark.parametrize("format", GGML.values(), ids=lambda f: f.name)
def test_zero_bytes_and_every_byte_value(format: Ggml):
    zero = np.zeros((1, format.block[1]), np.uint8)
    ramp = (np.arange(256 * format.block[1]) % 251).astype(np.uint8).reshape(256, -1)
    for raw in (zero, ramp):
        out = format.decode({"blocks": torch.from_numpy(raw)}, (len(raw), format.block[0]))
        assert same_floats(out.numpy(), reference_decode(raw, format.name))


@pytest.mark.parametrize("format", GGML.values(), ids=lambda f: f.name)
def test_rows_experts_and_chunks_decode_as_the_whole(format: Ggml, monkeypatch: pytest.MonkeyPatch):
    raw = torch.from_numpy(random_bytes(format, 12, 2))
    shape = (12, 2 * format.block[0])
    whole = format.decode({"blocks": raw}, shape)
    monkeypatch.setattr("bitfold.formats.families.ggml._CHUNK", 3 * format.block[0])
    assert same_floats(format.decode({"blocks": raw}, shape).numpy(), whole.numpy())
    stacked = format.decode({"blocks": raw.view(3, 4, -1)}, (3, 4, shape[1]))
    assert same_floats(stacked.view(shape).numpy(), whole.numpy())
    index = torch.tensor([7, 0, 7])
    assert same_floats(format.decode_rows({"blocks": raw}, shape, index).numpy(), whole[index].numpy())


@pytest.mark.parametrize("name", REFERENCE_WRITES)
@pytest.mark.parametrize("scale", [0.02, 1e-6, 37.0])
def test_encodes_as_the_reference(name: str, scale: float):
    w = gaussian(64, 512, seed=1, scale=scale)
    w[0] = 0
    w[1, :40] = 0
    w[2, ::3] = -w[2, 1::3][:171]  # equal magnitudes of both signs: ties for the extreme
    w[3] = np.abs(w[3])
    w[4] = np.float32(0.5) * scale  # constant
    w[5] = np.round(w[5] / scale) * scale
    ours = GGML[name].encode(torch.from_numpy(w))["blocks"].numpy()
    with np.errstate(all="ignore"):
        reference = gguf.quants.quantize(w, reference_type(name))
    assert np.array_equal(ours, reference)


@pytest.mark.parametrize("name", writable())
def test_zeros_stay_zeros_and_dtypes_do_not_matter(name: str):
    format = GGML[name]
    w = torch.from_numpy(gaussian(4, 512)).bfloat16()
    w[1] = 0
    fields = format.encode(w)
    assert torch.equal(fields["blocks"], format.encode(w.float())["blocks"])
    assert not format.decode(fields, (4, 512))[1].any()
    q = QTensor(format, (4, 512), fields)
    assert q.bpw == format.bpw


# SQNR on a Gaussian, dB: (at least, at most). Too good would be a bug as well: 6.02 dB a bit is the bound for 2**bits
# equally likely levels with free scales, and block scales of extremes cost 2 to 4 dB of it.
SQNR = {"q2_k": (9, 12), "q3_k": (15, 17.5), "q4_k": (21, 23.5), "q5_k": (27, 30), "q6_k": (33, 36), "iq4_nl": (21, 23)}
SQNR |= {"iq2_xxs": (9, 10.5), "iq2_xs": (10, 12), "iq2_s": (11.5, 13), "iq3_xxs": (14, 16), "iq3_s": (16, 18.5)}


@pytest.mark.parametrize("name", SQNR)
def test_our_own_encoders_lose_what_they_should(name: str):
    w = gaussian(256, 512, seed=2)
    raw = GGML[name].encode(torch.from_numpy(w))["blocks"].numpy()
    decoded = reference_decode(raw, name)
    sqnr = 10 * np.log10((w**2).sum() / ((w - decoded) ** 2).sum())
    low, high = SQNR[name]
    assert low < sqnr < high


@pytest.mark.parametrize("name", K_QUANTS)
def test_k_quant_codes_are_the_nearest_under_the_stored_scales(name: str):
    """Nudging any code up or down by one step must not come closer to the weight."""
    format = GGML[name]
    w = torch.from_numpy(gaussian(32, 512, seed=3))
    fields = format.encode(w)
    decoded, step = format.decode(fields, w.shape).double(), format.steps(fields, w.shape).double()
    error, rounding = (decoded - w).abs(), 4 * torch.finfo(torch.float32).eps * w.abs().max()
    parts = format.split(fields["blocks"].view(-1, format.block[1]))
    low, high = format.codes
    codes = parts.codes.flatten(1).view_as(w)
    sign = parts.scale.sign().expand_as(parts.codes).flatten(1).view_as(w)
    for direction in (-1, 1):
        allowed = (codes + direction >= low) & (codes + direction <= high)
        nudged = (decoded + direction * sign * step - w).abs()
        assert (error[allowed] <= nudged[allowed] + rounding).all()


@pytest.mark.parametrize("name", writable())
def test_encoding_what_was_decoded_changes_little(name: str):
    """A decoded weight is representable, so encoding it again must not lose a tenth of what the first time lost."""
    format = GGML[name]
    w = torch.from_numpy(gaussian(64, 512, seed=4))
    once = format.decode(format.encode(w), w.shape)
    again = format.decode(format.encode(once), w.shape)
    assert (again - once).square().sum() <= 0.1 * (once - w).square().sum()


def test_splitting_and_joining_bytes_are_inverse():
    raw = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (50, 96), dtype=np.uint8))
    for group, bits in [(1, 1), (4, 2), (8, 4), (16, 4), (32, 1), (32, 2), (32, 4)]:
        assert torch.equal(layouts.unplanes(layouts.planes(raw, group, bits), group, bits), raw)
    scale, low = layouts.split_six_bit_pairs(raw[:, :12])
    assert int(scale.max()) <= 63
    assert int(low.max()) <= 63
    assert torch.equal(layouts.join_six_bit_pairs(scale.int(), low.int()), raw[:, :12])


@pytest.mark.parametrize("name", VECTORS)
def test_vector_blocks_taken_apart_and_joined_are_the_same_bytes(name: str):
    raw = torch.from_numpy(random_bytes(GGML[name], 200, 1)[:, : GGML[name].block[1]])
    raw[:, 1] &= 0x7B  # no NaN: which bits of one survive is nobody's promise
    assert torch.equal(VECTORS[name].join(VECTORS[name].split(raw)), raw)


@pytest.mark.parametrize("name", [*VECTORS, "iq1_s"])
def test_points_are_those_of_the_reference(name: str):
    reference = getattr(gguf.quants, name.upper())
    reference.init_grid()
    assert np.array_equal(points(name).numpy(), reference.grid.reshape(reference.grid_shape))
    assert np.array_equal(even_signs(torch.arange(128)).numpy(), np.frombuffer(gguf.quants.IQ2_XXS.ksigns, np.uint8))


def test_bits_of_vector_codes_are_what_blocks_have_beside_their_scales():
    for name, vectors in VECTORS.items():
        size = GGML[name].block[1]
        scales = vectors.split(torch.zeros(1, size, dtype=torch.uint8)).scale.shape[1]
        assert GGML[name].bits * 256 + 4 * scales + 16 == 8 * size


def test_steps_are_the_stored_scales():
    w = torch.from_numpy(gaussian(8, 64, seed=6))
    fields = GGML["q4_1"].encode(w)
    stored = fields["blocks"].view(-1, 20)[:, :2].contiguous().view(torch.float16).float()
    assert torch.equal(GGML["q4_1"].steps(fields, (8, 64)), stored.expand(-1, 32).reshape(8, 64))


@pytest.mark.parametrize("format", GGML.values(), ids=lambda f: f.name)
def test_rows_must_be_whole_blocks(format: Ggml):
    with pytest.raises(FormatError, match=f"multiple of {format.block[0]}"):
        format.layout((4, format.block[0] + 16))


def test_what_cannot_be_encoded_says_so():
    q4 = GGML["q4_0"]
    with pytest.raises(FormatError, match="read but not written"):
        GGML["tq1_0"].encode(torch.zeros(2, 256))
    with pytest.raises(WeightError):
        q4.encode(torch.full((1, 32), float("nan")))
    with pytest.raises(FormatError, match="half precision"):
        q4.encode(torch.full((1, 32), 1e7))
    with pytest.raises(FormatError, match="own scales"):
        q4.encode(torch.zeros(1, 32), Params(torch.ones(1, 1)))
    with pytest.raises(FormatError, match="must be uint8"):
        q4.decode({"blocks": torch.zeros(1, 17, dtype=torch.uint8)}, (1, 32))
