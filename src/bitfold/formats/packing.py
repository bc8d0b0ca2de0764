"""Codes to bytes and back: the layout of every packed tensor of bitfold.

A row of n codes of b bits is one string of n*b bits, least significant bits first, cut into bytes and padded with zero
bits to a whole byte; rows follow each other. Code i occupies bits [i*b, (i+1)*b) of its row; bit j of a row is bit
j % 8 of byte j // 8. Dense for every b: 3, 5, 6 and 7 bits waste nothing but the last byte of a row. Since padding must
be zero, one tensor of codes has one packed form.

Codes in 0..2 (trits) fit five to a byte, since 3**5 = 243 <= 256; the first is the least significant digit in base 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bitfold.errors import PackingError
from bitfold.system import backend, native

_INTEGERS = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
_CHUNK = 1 << 20  # codes that the PyTorch path widens to 64 bits at once
_TRITS = 5


def packed_length(length: int, bits: int) -> int:
    """Bytes of a packed row of `length` codes of `bits` bits."""
    return (length * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of 1 to 8 bits densely, least significant bits first.

    Args:
        codes: (..., length), any integer dtype, values in 0 .. 2**bits - 1; the last dimension is packed.
        bits: bits of a code, 1 to 8.

    Returns:
        uint8 tensor (..., ceil(length * bits / 8)) on the device of `codes`.

    Raises:
        PackingError: not integers, no dimension, bits outside 1..8, or a code out of range.
    """
    _check_bits(bits)
    small = _as_bytes(codes, 2**bits)
    length = small.shape[-1]
    out = torch.empty((*small.shape[:-1], packed_length(length, bits)), dtype=torch.uint8, device=small.device)
    if not small.numel():
        return out
    core = backend.core_for(small)
    rows = small.numel() // length
    if core is not None:
        seen = core.pack(small.data_ptr(), rows, length, bits, out.data_ptr(), native.threads())
        in_range = seen < 2**bits
    else:
        in_range = bits == 8 or int(small.max()) < 2**bits
        if in_range:
            whole = length % 8 == 0  # then rows may be cut anywhere, and large ones are
            _torch_pack(small.view(-1, 8 if whole else length), bits, out.view(-1, bits if whole else out.shape[-1]))
    if not in_range:
        raise _out_of_range(codes, 2**bits)
    return out


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """The codes that `pack` packed.

    Args:
        packed: uint8 tensor (..., ceil(length * bits / 8)).
        bits: bits of a code, 1 to 8.
        length: codes in a row.

    Returns:
        uint8 tensor (..., length) on the device of `packed`.

    Raises:
        PackingError: not uint8, bits outside 1..8, a row of the wrong length, or padding bits that are not zero
            (accelerators do not look at these: each look would wait for the device).
    """
    _check_bits(bits)
    _check_packed(packed, packed_length(_check_length(length), bits), f"{length} codes of {bits} bits")
    if backend.at_once(packed):
        return packed if bits == 8 else _all(packed, length, lambda rows, index: take(rows, bits, index))
    used = length * bits % 8
    if used and packed.numel() and bool((packed[..., -1] >> used).any()):
        raise PackingError(f"the padding after {length} codes of {bits} bits is not zero", hint="corrupt data")
    packed = packed.contiguous()
    out = torch.empty((*packed.shape[:-1], length), dtype=torch.uint8, device=packed.device)
    if not out.numel():
        return out
    core = backend.core_for(packed)
    rows = out.numel() // length
    if core is not None:
        core.unpack(packed.data_ptr(), rows, length, bits, out.data_ptr(), native.threads())
    else:
        whole = length % 8 == 0
        _torch_unpack(packed.view(-1, bits if whole else packed.shape[-1]), bits, out.view(-1, 8 if whole else length))
    return out


def _all(packed: Tensor, length: int, take: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """All codes of all rows, taken at once."""
    rows = packed[None].flatten(0, -2)
    return take(rows, torch.arange(length, device=packed.device)).view(*packed.shape[:-1], length)


def pack_trits(codes: Tensor) -> Tensor:
    """Pack codes in 0..2 five to a byte, the first one least significant; a short last byte is filled with zeros.

    Args:
        codes: (..., length), any integer dtype.

    Returns:
        uint8 tensor (..., ceil(length / 5)) with values up to 242.

    Raises:
        PackingError: not integers, no dimension, or a code above 2 or below 0.
    """
    small = _as_bytes(codes, 3)
    if small.numel() and int(small.max()) > 2:
        raise _out_of_range(codes, 3)
    padded = torch.nn.functional.pad(small, (0, -small.shape[-1] % _TRITS))
    digits = padded.reshape(*padded.shape[:-1], padded.shape[-1] // _TRITS, _TRITS)
    out = digits[..., _TRITS - 1].clone()
    for place in reversed(range(_TRITS - 1)):
        out = out * 3 + digits[..., place]
    return out


def unpack_trits(packed: Tensor, length: int) -> Tensor:
    """The codes that `pack_trits` packed.

    Args:
        packed: uint8 tensor (..., ceil(length / 5)).
        length: codes in a row.

    Returns:
        uint8 tensor (..., length) with values in 0..2.

    Raises:
        PackingError: not uint8, a row of the wrong length, a byte above 242, or padding that is not zero (accelerators
            do not look at these two).
    """
    _check_packed(packed, -(-_check_length(length) // _TRITS), f"{length} trits")
    if backend.at_once(packed):
        return _all(packed, length, take_trits)
    if packed.numel() and int(packed.max()) >= 3**_TRITS:
        raise PackingError(f"a byte of packed trits is {int(packed.max())}, above 242", hint="corrupt data")
    digits = torch.empty((*packed.shape, _TRITS), dtype=torch.uint8, device=packed.device)
    for place in range(_TRITS):
        digits[..., place] = packed % 3
        packed = packed // 3
    flat = digits.flatten(-2)
    if bool(flat[..., length:].any()):
        raise PackingError(f"the padding after {length} trits is not zero", hint="corrupt data")
    return flat[..., :length].contiguous()


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise PackingError(f"bits must be a whole number from 1 to 8, not {bits!r}", where="bits")


def _check_length(length: int) -> int:
    if isinstance(length, bool) or not isinstance(length, int) or length < 0:
        raise PackingError(f"length must be a whole number, not {length!r}", where="length")
    return length


def _check_packed(packed: Tensor, want: int, what: str) -> None:
    if packed.dtype != torch.uint8:
        raise PackingError(f"packed data must be uint8, not {packed.dtype}", where="packed")
    if packed.dim() == 0:
        raise PackingError("packed data needs at least one dimension", where="packed")
    if packed.shape[-1] != want:
        raise PackingError(f"a row of {what} takes {want} bytes, this one has {packed.shape[-1]}", where="packed")


def _as_bytes(codes: Tensor, levels: int) -> Tensor:
    """Contiguous uint8 copy (or view) of codes; what a byte cannot hold is refused here."""
    if codes.dtype not in _INTEGERS:
        raise PackingError(f"codes must be integers, not {codes.dtype}", where="codes", hint="round and convert them")
    if codes.dim() == 0:
        raise PackingError("codes need at least one dimension: the last one is packed", where="codes")
    if codes.dtype == torch.uint8:
        return codes.contiguous()
    if codes.dtype in (torch.uint16, torch.uint32):  # PyTorch has hardly any arithmetic on these
        codes = codes.to(torch.int64)
    elif codes.dtype == torch.uint64:
        codes = codes.view(torch.int64)  # what does not fit becomes negative, and is refused
    if codes.numel():
        low, high = codes.aminmax()
        if int(low) < 0 or int(high) >= levels:
            raise _out_of_range(codes, levels)
    return codes.to(torch.uint8).contiguous()


def _out_of_range(codes: Tensor, levels: int) -> PackingError:
    wide = codes if codes.dtype == torch.int64 else codes.to(torch.int64)
    flat = int(((wide < 0) | (wide >= levels)).flatten().to(torch.uint8).argmax())
    place: list[int] = []
    for size in reversed(codes.shape):
        flat, at = divmod(flat, size)
        place.insert(0, at)
    return PackingError(f"code {int(codes[tuple(place)])} at {place} is not in 0..{levels - 1}", where="codes")


def _torch_pack(codes: Tensor, bits: int, out: Tensor) -> None:
    """codes (rows, length) -> out (rows, bytes): eight codes make a 64-bit number, of which `bits` bytes are kept."""
    if bits == 8:
        out.copy_(codes)
        return
    for part, kept in _chunks(codes, 8, out, bits):
        words = part[..., 0].long()
        for i in range(1, 8):
            words |= part[..., i].long() << (i * bits)
        for i in range(bits):
            kept[..., i] = (words >> (8 * i)) & 255


def _torch_unpack(packed: Tensor, bits: int, out: Tensor) -> None:
    """packed (rows, bytes) -> out (rows, length), the other way round."""
    if bits == 8:
        out.copy_(packed)
        return
    for part, kept in _chunks(packed, bits, out, 8):
        words = part[..., 0].long()
        for i in range(1, bits):
            words |= part[..., i].long() << (8 * i)
        for i in range(8):
            kept[..., i] = (words >> (i * bits)) & (2**bits - 1)


def _chunks(source: Tensor, width: int, target: Tensor, wide: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of the source in groups (rows, groups, width), and room for as many groups (rows, groups, wide).

    What the caller writes into that room goes to the same rows of the target, less the padding of the last group.
    """
    step = max(1, _CHUNK // max(source.shape[1], target.shape[1]))
    groups = -(-source.shape[1] // width)
    for at in range(0, len(source), step):
        part = torch.nn.functional.pad(source[at : at + step], (0, groups * width - source.shape[1]))
        room = torch.empty(len(part), groups, wide, dtype=torch.uint8, device=source.device)
        yield part.view(-1, groups, width), room
        target[at : at + step] = room.view(len(part), -1)[:, : target.shape[1]]


def take(packed: Tensor, bits: int, index: Tensor) -> Tensor:
    """Some codes of every row, without unpacking the others: unpack(packed, bits, length)[:, index].

    Args:
        packed: uint8 (rows, bytes), as `pack` returned it.
        bits: bits of a code, 1 to 8.
        index: int64 (count,), positions in a row.
    """
    _check_bits(bits)
    start = index * bits
    byte, last = start // 8, packed.shape[1] - 1
    word = packed[:, byte].int() | packed[:, (byte + 1).clamp_max(last)].int() << 8
    return (word >> (start % 8).int() & (1 << bits) - 1).to(torch.uint8)


def take_trits(packed: Tensor, index: Tensor) -> Tensor:
    """unpack_trits(packed, length)[:, index], without unpacking the others."""
    return (packed[:, index // _TRITS].int() // 3 ** (index % _TRITS).int() % 3).to(torch.uint8)
