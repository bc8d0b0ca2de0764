"""The GGUF container, versions 2 and 3, read without trust: facts and positions, no tensor data.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), all little-endian: magic, version, number of
tensors, number of metadata entries, the entries, the tensor descriptions, padding to `general.alignment`, tensor data.
A file is input from a stranger: every length is compared with the bytes that remain before anything is allocated for
it, and tensors must lie inside the file, aligned and apart from each other.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from bitfold.errors import CheckpointError

# id: (name, weights of a block, bytes of a block). Types that are not decoded are listed so that files holding them
# can still be checked and inspected, and errors can name them.
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("f32", 1, 4),
    1: ("f16", 1, 2),
    2: ("q4_0", 32, 18),
    3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34),
    9: ("q8_1", 32, 40),
    10: ("q2_k", 256, 84),
    11: ("q3_k", 256, 110),
    12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210),
    15: ("q8_k", 256, 292),
    16: ("iq2_xxs", 256, 66),
    17: ("iq2_xs", 256, 74),
    18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18),
    21: ("iq3_s", 256, 110),
    22: ("iq2_s", 256, 82),
    23: ("iq4_xs", 256, 136),
    24: ("i8", 1, 1),
    25: ("i16", 1, 2),
    26: ("i32", 1, 4),
    27: ("i64", 1, 8),
    28: ("f64", 1, 8),
    29: ("iq1_m", 256, 56),
    30: ("bf16", 1, 2),
    34: ("tq1_0", 256, 54),
    35: ("tq2_0", 256, 66),
    39: ("ggml_mxfp4", 32, 17),
    40: ("ggml_nvfp4", 64, 36),
}

_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_FLOAT32, _BOOL, _STRING, _ARRAY = 6, 7, 8, 9
_SMALLEST_ENTRY = 8 + 4 + 1  # an empty key, a type, one byte
_SMALLEST_TENSOR = 8 + 4 + 4 + 8  # an empty name, no dimensions, a type, an offset
_MAX_DEPTH = 4


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: `shape` in row-major order (rows first), `start` in bytes from the beginning of the file."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    start: int
    nbytes: int

    @property
    def type(self) -> str:
        """Name of the ggml type, as in FORMATS for block types."""
        return GGML_TYPES[self.type_id][0]


class GgufFile:
    """Metadata and tensor positions of an open GGUF file.

    Args:
        path: the file.

    Raises:
        CheckpointError: not a GGUF file, or one that is truncated or contradicts itself.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._map = _open_map(self.path)
        self._views: mmap.mmap | None = None
        self.size = len(self._map)
        try:
            cursor = _Cursor(self._map, self.path)
            tensor_count = self._read_header(cursor)
            self.metadata = self._read_metadata(cursor, self._entries)
            self.tensors = self._read_tensors(cursor, tensor_count)
        except BaseException:
            self.close()
            raise

    def raw(self, tensor: GgufTensor, start: int = 0, length: int | None = None) -> bytearray:
        """Bytes of a tensor (or `length` of them from `start`).

        Read, not copied out of the map: pages of a map that were touched count as memory of the process.
        """
        data = bytearray(tensor.nbytes if length is None else length)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(tensor.start + start)
                if len(data) != _fill(file, memoryview(data)):
                    raise OSError("the file ended early")
        except OSError as error:
            raise CheckpointError(f"cannot read tensor {tensor.name!r}: {error}", where=str(self.path)) from error
        return data

    def view(self, tensor: GgufTensor) -> memoryview:
        """Bytes of a tensor in the file, mapped: nothing is read before it is used, and other processes share it.

        What is written to them stays in this process. The map lives as long as a view of it.
        """
        if self._views is None:
            try:
                with self.path.open("rb") as file:
                    self._views = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"cannot be mapped: {error}", where=str(self.path)) from error
        return memoryview(self._views)[tensor.start : tensor.start + tensor.nbytes]

    def data_bytes(self) -> int:
        """Bytes between the first tensor and the end of the file, less the padding that the alignment explains.

        CheckpointError when there is a hole that no padding explains.
        """
        ordered = sorted(self.tensors.values(), key=lambda t: t.start)
        ends = [*(t.start for t in ordered[1:]), self.size]
        holes = [end - t.start - t.nbytes for t, end in zip(ordered, ends, strict=True)]
        for tensor, hole in zip(ordered, holes, strict=True):
            if hole >= self.alignment:
                what = f"{hole} bytes after it belong to no tensor"
                raise CheckpointError(what, where=f"{self.path}: tensor {tensor.name!r}", hint="the file is damaged")
        return (self.size - ordered[0].start if ordered else 0) - sum(holes)

    @property
    def alignment(self) -> int:
        """Tensors begin at multiples of so many bytes."""
        return int(self.metadata.get("general.alignment", 32))

    def close(self) -> None:
        """Release the map, but for views of it."""
        self._map.close()
        self._views = None

    def _read_header(self, cursor: _Cursor) -> int:
        if cursor.take(4, "magic") != b"GGUF":
            raise CheckpointError("not a GGUF file: it does not begin with 'GGUF'", where=str(self.path))
        version = cursor.u32("version")
        if version not in (2, 3):
            swapped = version >> 16 and not version & 0xFFFF
            what = "a big-endian GGUF file" if swapped else f"GGUF version {version}"
            hint = "convert it to little-endian" if swapped else "versions 2 and 3 are read; convert the model again"
            raise CheckpointError(f"{what} cannot be read", where=str(self.path), hint=hint)
        tensors, self._entries = cursor.u64("tensor count"), cursor.u64("metadata count")
        if tensors * _SMALLEST_TENSOR + self._entries * _SMALLEST_ENTRY > cursor.left:
            what = f"{tensors} tensors and {self._entries} metadata entries"
            raise cursor.error(f"the header announces {what}, more than the file can hold", cut=True)
        return tensors

    def _read_metadata(self, cursor: _Cursor, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = cursor.string("metadata key")
            if key in metadata:
                raise cursor.error(f"metadata key {key!r} appears twice")
            metadata[key] = cursor.value(cursor.u32(f"type of {key!r}"), key)
        return metadata

    def _read_tensors(self, cursor: _Cursor, count: int) -> dict[str, GgufTensor]:
        found = [_read_tensor(cursor) for _ in range(count)]
        align = self.metadata.get("general.alignment", 32)
        if not isinstance(align, int) or not 8 <= align <= 1 << 20 or align & (align - 1):
            raise cursor.error(f"general.alignment is {align!r}, not a power of two from 8 to 1048576")
        base = (cursor.pos + align - 1) // align * align
        placed: dict[str, GgufTensor] = {}
        for t in found:
            if t.name in placed:
                raise cursor.error("appears twice", tensor=t.name)
            if t.start % align:
                raise cursor.error(f"offset {t.start} is not a multiple of the alignment {align}", tensor=t.name)
            if base + t.start + t.nbytes > self.size:
                end = base + t.start + t.nbytes
                raise cursor.error(f"ends at byte {end} of a file of {self.size} bytes", tensor=t.name, cut=True)
            placed[t.name] = GgufTensor(t.name, t.shape, t.type_id, base + t.start, t.nbytes)
        _refuse_overlap(list(placed.values()), cursor)
        return placed


def _fill(file: FileIO, into: memoryview) -> int:
    """Read until it is full or the file ends (one call of the system reads 2 GiB at most); bytes read."""
    done = 0
    while done < len(into) and (count := file.readinto(into[done:])):
        done += count
    return done


def _open_map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:  # mmap of an empty file
        raise CheckpointError("the file is empty", where=str(path)) from error
    except OSError as error:
        raise CheckpointError(f"cannot be opened: {error.strerror or error}", where=str(path)) from error


def _refuse_overlap(tensors: list[GgufTensor], cursor: _Cursor) -> None:
    ordered = sorted(tensors, key=lambda t: t.start)
    for before, after in pairwise(ordered):
        if before.start + before.nbytes > after.start:
            raise cursor.error(f"overlaps {before.name!r} in the file", tensor=after.name)


def _read_tensor(cursor: _Cursor) -> GgufTensor:
    name = cursor.string("tensor name")
    count = cursor.u32(f"dimensions of {name!r}")
    if not 1 <= count <= 4:
        raise cursor.error(f"has {count} dimensions, not 1 to 4", tensor=name)
    shape = tuple(reversed([cursor.u64(f"shape of {name!r}") for _ in range(count)]))
    type_id, offset = cursor.u32(f"type of {name!r}"), cursor.u64(f"offset of {name!r}")
    if type_id not in GGML_TYPES:
        raise cursor.error(f"has type {type_id}, which this version does not know", tensor=name)
    type_name, weights, nbytes = GGML_TYPES[type_id]
    if 0 in shape or shape[-1] % weights:
        raise cursor.error(f"shape {shape} cannot be of type {type_name} (blocks of {weights})", tensor=name)
    return GgufTensor(name, shape, type_id, offset, prod(shape) // weights * nbytes)


class _Cursor:
    """A position in the file; nothing is read past its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.pos = data, path, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.pos

    def error(self, what: str, *, tensor: str | None = None, cut: bool = False) -> CheckpointError:
        where = f"{self.path}: tensor {tensor!r}" if tensor else str(self.path)
        hint = "the file is truncated; download it again" if cut else "the file is damaged or not made by a sound tool"
        return CheckpointError(what, where=where, hint=hint)

    def take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise self.error(f"{what} needs {count} bytes at byte {self.pos}, {self.left} remain", cut=True)
        self.pos += count
        return self.data[self.pos - count : self.pos]

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def string(self, what: str) -> str:
        return self.text(self.take(self.u64(what), what), what)

    def text(self, raw: bytes, what: str) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not valid UTF-8") from error

    def value(self, type_id: int, key: str, depth: int = 0) -> Any:
        if type_id == _STRING:
            return self.string(key)
        if type_id == _ARRAY:
            return self.array(key, depth)
        return self.numbers(type_id, 1, key)[0]

    def numbers(self, type_id: int, count: int, key: str) -> list[Any]:
        if type_id == _BOOL:
            return [b != 0 for b in self.take(count, key)]
        if type_id not in _SCALARS:
            raise self.error(f"metadata {key!r} has the unknown type {type_id}")
        dtype = np.dtype(_SCALARS[type_id])
        values = np.frombuffer(self.take(count * dtype.itemsize, key), dtype)
        # float32 facts such as 1e-05 get their shortest decimal, not the 17 digits of the widened number.
        return [float(str(v)) for v in values] if type_id == _FLOAT32 and count == 1 else values.tolist()

    def array(self, key: str, depth: int) -> list[Any]:
        element, count = self.u32(key), self.u64(key)
        if depth >= _MAX_DEPTH:
            raise self.error(f"metadata {key!r} nests arrays more than {_MAX_DEPTH} deep")
        if element not in (_STRING, _ARRAY):
            return self.numbers(element, count, key)
        least = 8 if element == _STRING else 12
        if count * least > self.left:
            raise self.error(f"metadata {key!r} announces {count} elements, {self.left} bytes remain", cut=True)
        if element == _STRING:
            return self.strings(count, key)
        return [self.value(_ARRAY, key, depth + 1) for _ in range(count)]

    def strings(self, count: int, key: str) -> list[str]:
        """Like `string`, `count` times, without its overhead: vocabularies have 10^5 entries."""
        unpack: Callable[[Any, int], tuple[int]] = struct.Struct("<Q").unpack_from
        data, pos, size, out = self.data, self.pos, len(self.data), []
        for _ in range(count):
            end = pos + 8 + unpack(data, pos)[0] if pos + 8 <= size else size + 1
            if end > size:
                raise self.error(f"metadata {key!r} runs past the end of the file", cut=True)
            out.append(self.text(data[pos + 8 : end], key))
            pos = end
        self.pos = pos
        return out
