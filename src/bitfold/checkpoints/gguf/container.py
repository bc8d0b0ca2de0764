"""The GGUF container, version 3, as it is written: the inverse of `file`.

All tensors are known before the first byte of one is there, so the whole head is, and tensors can be written in any
order. Kinds of metadata follow from Python's types: llama.cpp asks for counts as 32-bit numbers without a sign, and for
real numbers as float32.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitfold.checkpoints.gguf.file import GGML_TYPES
from bitfold.checkpoints.shards import Shard, ShardPlan, divided, numbered
from bitfold.errors import CheckpointError
from bitfold.system.tensorinfo import TensorInfo

ALIGNMENT = 32
_TYPE_IDS = {name: number for number, (name, _, _) in GGML_TYPES.items()}
_U16, _U32, _I32, _F32, _BOOL, _STRING, _ARRAY, _U64, _I64 = 2, 4, 5, 6, 7, 8, 9, 10, 11
_VERSION = 3
_NAMED_KINDS: tuple[tuple[type, int], ...] = ((np.uint16, _U16), (np.int32, _I32))
_MOST_PARTS = 65535
_HEAD_OF_A_PART = 192  # bytes of counts, of what says which part it is, and of padding
_LONGEST_NAME = 63  # bytes; ggml keeps names in 64, with a zero at the end


@dataclass(frozen=True)
class Laid:
    """A tensor of a file.

    Args:
        type: name of the ggml type.
        shape: of the weight, rows first.
        info: dtype and shape of what is written: uint8 for blocks.
        stack: it is written one by one along its first dimension, by the names of `entries`.
    """

    type: str
    shape: tuple[int, ...]
    info: TensorInfo
    stack: bool = False

    def entries(self, name: str) -> dict[str, TensorInfo]:
        """What is written one by one: all of the tensor of that name, or each of a stack: NAME[0] and so on."""
        if not self.stack:
            return {name: self.info}
        one = TensorInfo(self.info.dtype, self.info.shape[1:])
        return {entry_name(name, i): one for i in range(self.shape[0])}


def entry_name(name: str, number: int) -> str:
    """Of one of a stack."""
    return f"{name}[{number}]"


def plan_parts(
    name: str, metadata: Mapping[str, Any], tensors: Mapping[str, Laid], max_bytes: int | None = None
) -> ShardPlan:
    """The files of a model: heads made, every tensor in its place, in the order given.

    Several are laid out as llama.cpp's gguf-split does it: the first has the metadata, and each says which it is.

    Args:
        name: of the file; where it takes several, they are NAME-00001-of-00003.gguf and so on.
        metadata: of the model.
        tensors: by name.
        max_bytes: of tensors in a file; a larger one has a file for itself. None: one file, whatever its size.

    Raises:
        CheckpointError: a name or a shape that GGUF cannot hold, metadata of a kind that it does not know, or more
            files than it counts.
    """
    infos = {tensor: laid.info for tensor, laid in tensors.items()}
    groups = [infos] if max_bytes is None else divided(infos, max_bytes)
    count = len(groups)
    if count > _MOST_PARTS:
        raise CheckpointError(f"{count} files are more than GGUF counts", where=name, hint="a larger --max-shard-size")
    shards = []
    for i, (file, group) in enumerate(zip(numbered(name, count), groups, strict=True)):
        said = {} if i else dict(metadata)
        if count > 1:  # kinds that llama.cpp's loader insists on
            said |= {"split.no": np.uint16(i), "split.count": np.uint16(count)}
            said["split.tensors.count"] = np.int32(len(tensors))
        shards.append(_shard(file, said, {tensor: tensors[tensor] for tensor in group}))
    return ShardPlan(tuple(shards))


def parts_bytes(nbytes: int, max_bytes: int | None) -> int:
    """How much larger than one file the parts of a model of so many bytes are together, at most."""
    return 0 if max_bytes is None else (2 * nbytes // max_bytes + 1) * _HEAD_OF_A_PART


def _shard(name: str, metadata: Mapping[str, Any], tensors: Mapping[str, Laid]) -> Shard:
    descriptions, offset, offsets, infos = [], 0, dict[str, int](), dict[str, TensorInfo]()
    for tensor, laid in tensors.items():
        descriptions.append(_description(tensor, laid, offset))
        for number, (entry, info) in enumerate(laid.entries(tensor).items()):
            offsets[entry], infos[entry] = offset + number * info.nbytes, info
        offset += _padded(laid.info.nbytes)
    counts = b"GGUF" + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))
    entries = [_string(key) + _value(key, value) for key, value in metadata.items()]
    head = b"".join([counts, *entries, *descriptions])
    head += bytes(_padded(len(head)) - len(head))
    return Shard(name, head, {entry: len(head) + at for entry, at in offsets.items()}, infos, ALIGNMENT)


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _description(name: str, laid: Laid, offset: int) -> bytes:
    if len(name.encode()) > _LONGEST_NAME or not 1 <= len(laid.shape) <= 4:
        what = f"a tensor of {len(laid.shape)} dimensions and a name of {len(name.encode())} bytes has no place in GGUF"
        raise CheckpointError(what, where=name)
    sizes = struct.pack(f"<I{len(laid.shape)}Q", len(laid.shape), *reversed(laid.shape))
    return _string(name) + sizes + struct.pack("<IQ", _TYPE_IDS[laid.type], offset)


def _string(text: str) -> bytes:
    # A lone surrogate stands for bytes that are no text; GGUF's strings are UTF-8.
    raw = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Any) -> bytes:
    kind = _kind(key, value)
    if kind != _ARRAY:
        return struct.pack("<I", kind) + _scalar(kind, value)
    element = _element(key, value) if value else _STRING
    return struct.pack("<IIQ", _ARRAY, element, len(value)) + _elements(element, value)


def _kind(key: str, value: Any) -> int:
    for python, kind in (*_NAMED_KINDS, (bool, _BOOL), (str, _STRING), (float, _F32), (list, _ARRAY)):
        if isinstance(value, python):
            return kind
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return _U32 if 0 <= value < 2**32 else _U64 if value > 0 else _I32 if value >= -(2**31) else _I64
    raise CheckpointError(f"metadata {key} cannot be {value!r} in a GGUF file")


def _element(key: str, values: Sequence[Any]) -> int:
    """llama.cpp reads lists of whole numbers (kinds of tokens) with their sign."""
    kinds = {_kind(key, value) for value in values}
    if kinds == {_U32} or kinds == {_U32, _I32}:
        return _I32
    if len(kinds) == 1:
        return kinds.pop()
    raise CheckpointError(f"metadata {key} is a list of different kinds")


def _scalar(kind: int, value: Any) -> bytes:
    if kind == _STRING:
        return _string(value)
    code = {_U16: "<H", _U32: "<I", _I32: "<i", _F32: "<f", _BOOL: "<?", _U64: "<Q", _I64: "<q"}[kind]
    return struct.pack(code, value)


def _elements(kind: int, values: Sequence[Any]) -> bytes:
    if kind in (_I32, _F32):
        return np.asarray(values, dtype=np.dtype("<i4" if kind == _I32 else "<f4")).tobytes()
    return b"".join(_scalar(kind, value) for value in values)
