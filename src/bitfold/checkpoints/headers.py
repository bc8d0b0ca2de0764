"""Headers of safetensors files: read without trust, written with every byte in its place.

Eight bytes of length, a JSON object of names, dtypes, shapes and offsets, then the data with no holes. A header is
checked against the size of its file before anything is allocated.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitfold.checkpoints.untrusted import LARGEST, parse_json_object, shape_of
from bitfold.errors import CheckpointError
from bitfold.system.tensorinfo import TensorInfo

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64,
}  # fmt: skip
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # dtypes of the format that torch has no tensors of


@dataclass(frozen=True)
class ForeignInfo(TensorInfo):
    """A tensor of a dtype that torch has no tensors of: it can be told of, not read.

    Args:
        dtype: uint8, in place of the missing one.
        shape: numbers, as the file says.
        label: the dtype as the file says: "F4", "F6_E2M3", or one that is newer than this program.
        stored: its bytes in the file.
    """

    label: str
    stored: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.stored


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes in a safetensors file, in the order of the data, checked against its size.

    Tensors of dtypes that torch does not have come as `ForeignInfo`.

    Raises:
        CheckpointError: truncated file, a header that is not JSON, holes, overlaps.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > LARGEST and length <= size - 8:
                raise CheckpointError(f"has a header of {length} bytes, {LARGEST} are allowed", where=str(file))
            if length > size - 8:
                raise _cut_short(prefix, size, file)
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"is not a safetensors file: {error}", where=str(file)) from error
    return _check_header(parse_json_object(raw, str(file)), size - 8 - length, file)


def _cut_short(begin: bytes, size: int, file: Path) -> CheckpointError:
    """What downloads leave in place of the weights: nothing, a pointer to them, the page of a site that refused."""
    if size == 0:
        return CheckpointError("the file is empty", where=str(file), hint="fetch it again")
    if begin.startswith(b"version"):
        hint = "fetch what it points to: git lfs pull, or huggingface-cli download"
        return CheckpointError("is a Git LFS pointer, not the weights", where=str(file), hint=hint)
    if b"\0" not in begin and begin.lstrip().startswith((b"<", b"{", b"Access", b"Invalid", b"Entry", b"Reposito")):
        hint = "fetch it again; a gated repository wants an accepted licence and a login"
        return CheckpointError("is the answer of a server, not the weights", where=str(file), hint=hint)
    what = "the file is truncated: its header is longer than the file"
    return CheckpointError(what, where=str(file), hint="fetch it again")


def _check_header(header: dict[str, Any], data_size: int, file: Path) -> dict[str, TensorInfo]:
    try:
        entries = [(n, e) for n, e in header.items() if n != "__metadata__"]
        entries.sort(key=lambda item: tuple(item[1]["data_offsets"]))
        at, infos = 0, {}
        for name, entry in entries:
            start, stop = entry["data_offsets"]
            info = _info(entry["dtype"], shape_of(entry["shape"]), stop - start)
            if start != at or info is None:
                raise CheckpointError(f"tensor {name}: its bytes do not follow its shape", where=str(file))
            infos[name], at = info, stop
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the header is damaged: {error!r}", where=str(file)) from error
    if at > data_size:
        raise CheckpointError(
            f"the file is truncated: {data_size} bytes of data, {at} expected", where=str(file), hint="fetch it again"
        )
    if at < data_size:
        raise CheckpointError(f"{data_size - at} bytes at the end belong to no tensor", where=str(file))
    return infos


def _info(dtype: Any, shape: tuple[int, ...], nbytes: int) -> TensorInfo | None:
    """What is known of a tensor; None when it cannot have so many bytes."""
    if dtype in DTYPES:
        info = TensorInfo(DTYPES[dtype], shape)
        return info if info.nbytes == nbytes else None
    if not isinstance(dtype, str) or not dtype.isascii() or not dtype.isprintable() or len(dtype) > 24:
        raise ValueError(f"{str(dtype)[:60]!r} is not the name of a dtype")
    foreign = ForeignInfo(torch.uint8, shape, dtype, nbytes)
    fits = nbytes >= 0 if dtype not in _BITS else foreign.numel * _BITS[dtype] == 8 * nbytes
    return foreign if fits else None


def make_header(order: list[str], infos: Mapping[str, TensorInfo]) -> bytes:
    """Header of a file that holds these tensors one after the other, its length in front, padded to 8 bytes."""
    names = {dtype: text for text, dtype in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        info = infos[name]
        stop = at + info.nbytes
        entries[name] = {"dtype": names[info.dtype], "shape": list(info.shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def data_size(file: Path) -> int:
    """Bytes of a safetensors file that are not its header."""
    with file.open("rb") as stream:
        return file.stat().st_size - 8 - int(struct.unpack("<Q", stream.read(8))[0])
