"""Packing: the layout bit by bit, both paths, everything that must be refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitfold.errors import PackingError
from bitfold.formats.packing import pack, pack_trits, packed_length, unpack, unpack_trits
from bitfold.system import native

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setenv("BITFOLD_NATIVE", "0")
    elif native.core() is None:
        pytest.skip("no native core in this installation")
    return request.param


@pytest.fixture(params=native.core().isas() if native.core() else [])
def isa(request):
    core = native.core()
    before = core.isa()
    assert core.set_isa(request.param)
    yield request.param
    core.set_isa(before)


def by_the_bit(codes: list[int], bits: int) -> list[int]:
    """The definition of the layout."""
    number = sum(code << i * bits for i, code in enumerate(codes))
    return list(number.to_bytes(packed_length(len(codes), bits), "little"))


def random_codes(shape: tuple[int, ...], bits: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_the_example_of_the_specification(path):
    assert pack(torch.tensor([1, 0, 3, 2]), 2).tolist() == [177]
    five = pack(torch.tensor([1, 0, 3, 2, 1]), 2)
    assert five.tolist() == [177, 1]
    assert unpack(five, 2, 5).tolist() == [1, 0, 3, 2, 1]


@pytest.mark.parametrize("bits", range(1, 9))
def test_layout_and_round_trip(path, bits):
    for length in [*range(1, 40), 63, 64, 65, 127, 128, 129, 1000]:
        codes = random_codes((3, length), bits, seed=length)
        packed = pack(codes, bits)
        assert packed.tolist() == [by_the_bit(row, bits) for row in codes.tolist()]
        assert torch.equal(unpack(packed, bits, length), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_instruction_set_gives_the_same_bytes(isa, bits, monkeypatch):
    for shape in [(5, 4099), (1, 1 << 18), (257, 100)]:
        codes = random_codes(shape, bits)
        packed = pack(codes, bits)
        assert torch.equal(unpack(packed, bits, shape[1]), codes)
        with monkeypatch.context() as patch:
            patch.setenv("BITFOLD_NATIVE", "0")
            assert torch.equal(pack(codes, bits), packed)
            assert torch.equal(unpack(packed, bits, shape[1]), codes)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), max_size=300))))
def test_any_codes(case):
    bits, codes = case
    packed = pack(torch.tensor(codes, dtype=torch.int64), bits)
    assert packed.tolist() == by_the_bit(codes, bits)
    assert unpack(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integer_dtypes(path, dtype):
    codes = torch.tensor([[1, 0, 3, 2], [7, 6, 5, 4]]).to(dtype)
    assert pack(codes, 3).tolist() == [by_the_bit([1, 0, 3, 2], 3), by_the_bit([7, 6, 5, 4], 3)]


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (0,), (0, 5), (5, 0), (2, 0, 3), (1, 1, 1, 1)])
def test_shapes_and_empty_tensors(path, shape):
    codes = random_codes(shape, 5)
    packed = pack(codes, 5)
    assert packed.shape == (*shape[:-1], packed_length(shape[-1], 5))
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, 5, shape[-1]), codes)


def test_not_contiguous(path):
    codes = random_codes((9, 17), 4).T
    packed = pack(codes, 4)
    assert torch.equal(packed, pack(codes.contiguous(), 4))
    wide = torch.empty(17, 10, dtype=torch.uint8)
    wide[:, ::2] = packed
    assert torch.equal(unpack(wide[:, ::2], 4, 9), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64])
def test_only_integers(path, dtype):
    with pytest.raises(PackingError, match="codes must be integers"):
        pack(torch.zeros(4).to(dtype), 2)


@pytest.mark.parametrize("bits", [0, 9, -1, 2.0, True, None])
def test_bits_out_of_range(path, bits):
    with pytest.raises(PackingError, match="from 1 to 8"):
        pack(torch.zeros(4, dtype=torch.uint8), bits)
    with pytest.raises(PackingError, match="from 1 to 8"):
        unpack(torch.zeros(4, dtype=torch.uint8), bits, 4)


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_code_out_of_range_is_named(path, bits):
    for where in [0, 31, 32, 90, 100]:
        codes = random_codes((3, 101), bits)
        codes[1, where] = 2**bits
        with pytest.raises(PackingError, match=rf"code {2**bits} at \[1, {where}\] is not in 0\.\.{2**bits - 1}"):
            pack(codes, bits)


@pytest.mark.parametrize(("dtype", "value"), [(torch.int8, -1), (torch.int64, 256), (torch.int64, -(2**63))])
def test_what_a_byte_cannot_hold(path, dtype, value):
    with pytest.raises(PackingError, match=rf"code {value} at \[2\]"):
        pack(torch.tensor([0, 1, value], dtype=dtype), 8)


def test_uint64_beyond_int64():
    with pytest.raises(PackingError):
        pack(torch.tensor([2**64 - 1], dtype=torch.uint64), 8)


def test_scalars_are_refused():
    with pytest.raises(PackingError, match="dimension"):
        pack(torch.tensor(1), 2)


def test_unpack_refuses_wrong_data(path):
    with pytest.raises(PackingError, match="takes 2 bytes, this one has 3"):
        unpack(torch.zeros(2, 3, dtype=torch.uint8), 2, 5)
    with pytest.raises(PackingError, match="padding"):
        unpack(torch.tensor([177, 5], dtype=torch.uint8), 2, 5)
    with pytest.raises(PackingError, match="must be uint8"):
        unpack(torch.tensor([177]), 2, 4)
    with pytest.raises(PackingError, match="length"):
        unpack(torch.tensor([177], dtype=torch.uint8), 2, -4)
    with pytest.raises(PackingError, match="dimension"):
        unpack(torch.tensor(177, dtype=torch.uint8), 2, 4)


@pytest.mark.parametrize("length", [0, 1, 4, 5, 6, 23, 1000])
def test_trits(length):
    codes = torch.randint(0, 3, (2, length), generator=torch.Generator().manual_seed(length))
    packed = pack_trits(codes)
    assert packed.shape == (2, -(-length // 5))
    assert torch.equal(unpack_trits(packed, length), codes.to(torch.uint8))


def test_trits_layout():
    assert pack_trits(torch.tensor([1, 2, 0, 0, 2, 1])).tolist() == [1 + 2 * 3 + 2 * 81, 1]
    assert pack_trits(torch.full((5,), 2)).tolist() == [242]


def test_trits_refuse_wrong_data():
    for bad in (torch.tensor([0, 3]), torch.tensor([0, -1]), torch.tensor([0, 255], dtype=torch.uint8)):
        with pytest.raises(PackingError, match=r"at \[1\] is not in 0\.\.2"):
            pack_trits(bad)
    with pytest.raises(PackingError, match="above 242"):
        unpack_trits(torch.tensor([243], dtype=torch.uint8), 5)
    with pytest.raises(PackingError, match="padding"):
        unpack_trits(torch.tensor([27], dtype=torch.uint8), 3)
    with pytest.raises(PackingError, match="takes 1 bytes"):
        unpack_trits(torch.tensor([27, 0], dtype=torch.uint8), 3)
