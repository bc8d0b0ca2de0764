"""What is in a checkpoint: the format, bits and bytes of each tensor, read from headers alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from bitfold.checkpoints.base import TensorInfo
from bitfold.checkpoints.bitfold_folder import QuantizedSource, quantization_config
from bitfold.checkpoints.foreign import foreign_quantization
from bitfold.checkpoints.headers import ForeignInfo
from bitfold.checkpoints.packed import PackedSource, open_packed
from bitfold.checkpoints.safetensors import SafetensorsSource
from bitfold.checkpoints.schema import read_entries
from bitfold.errors import CheckpointError

_FLOAT_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


@dataclass(frozen=True)
class TensorRow:
    """One tensor as it is stored.

    Args:
        tensor: its name in the file.
        format: a format of bitfold, a ggml type, or the dtype.
        shape: of the weight, not of its packed fields.
        numel: numbers in it.
        nbytes: stored bytes, all fields counted.
        quantized: stored in fewer bits than a float of 16, or with scales.
        note: why it was kept, or how it is used.
    """

    tensor: str
    format: str
    shape: tuple[int, ...]
    numel: int
    nbytes: int
    quantized: bool
    note: str = ""

    @property
    def bpw(self) -> float:
        """Stored bits for each number."""
        return 8 * self.nbytes / max(1, self.numel)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "shape": list(self.shape), "bpw": self.bpw}


@dataclass(frozen=True)
class FormatTotal:
    """All tensors of one format."""

    format: str
    tensors: int
    numel: int
    nbytes: int
    quantized: bool

    @property
    def bpw(self) -> float:
        """Stored bits for each number."""
        return 8 * self.nbytes / max(1, self.numel)


@dataclass(frozen=True)
class Inspection:
    """A checkpoint.

    Args:
        path: the folder or file.
        kind: "bitfold", "safetensors", "gguf", or "safetensors (HOW)" for folders other programs quantized; those
            that can be read are listed by the model's tensors, others by what lies in the files.
        model_type: architecture as the config names it, or None.
        tensors: one row each.
        recipe: the rules it was quantized with, if bitfold did.
    """

    path: str
    kind: str
    model_type: str | None
    tensors: tuple[TensorRow, ...]
    recipe: tuple[dict[str, Any], ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(row.nbytes for row in self.tensors)

    @property
    def numel(self) -> int:
        """Numbers in all tensors."""
        return sum(row.numel for row in self.tensors)

    @property
    def bpw(self) -> float:
        """Stored bits for each number, over everything."""
        return 8 * self.nbytes / max(1, self.numel)

    @property
    def bpw_quantized(self) -> float | None:
        """Stored bits for each weight over the quantized tensors; None when there are none."""
        rows = [row for row in self.tensors if row.quantized]
        return 8 * sum(row.nbytes for row in rows) / sum(row.numel for row in rows) if rows else None

    def totals(self) -> list[FormatTotal]:
        """Totals for each format, largest first."""
        groups: dict[str, list[TensorRow]] = {}
        for row in self.tensors:
            groups.setdefault(row.format, []).append(row)
        totals = [
            FormatTotal(name, len(rows), sum(r.numel for r in rows), sum(r.nbytes for r in rows), rows[0].quantized)
            for name, rows in groups.items()
        ]
        return sorted(totals, key=lambda total: -total.nbytes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with stable keys."""
        return {
            "path": self.path,
            "kind": self.kind,
            "model_type": self.model_type,
            "numel": self.numel,
            "bytes": self.nbytes,
            "bpw": self.bpw,
            "bpw_quantized": self.bpw_quantized,
            "formats": [{**asdict(total), "bpw": total.bpw} for total in self.totals()],
            "recipe": list(self.recipe),
            "tensors": [row.to_dict() for row in self.tensors],
        }


def inspect(path: str | Path, *, as_model: bool = False) -> Inspection:
    """Read the headers of a local folder or GGUF file.

    Args:
        path: the folder or file.
        as_model: tensors of a GGUF file go by the names that they have in the model, not in the file.

    Raises:
        CheckpointError: nothing there, or damaged.
    """
    from bitfold.checkpoints import find_checkpoint

    path = find_checkpoint(Path(path))
    found = _inspect_gguf(path, as_model) if path.is_file() else _inspect_folder(path)
    return replace(found, tensors=tuple(sorted(found.tensors, key=_by_layer)))


def _by_layer(row: TensorRow) -> list[tuple[int, str]]:
    """Sort key: layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in row.tensor.split(".")]


def _inspect_folder(path: Path) -> Inspection:
    if (quantization := quantization_config(path)) is not None:
        return _inspect_bitfold(path, QuantizedSource(path), quantization)
    source = SafetensorsSource(path)  # not open_source: what it refuses is looked at all the same
    infos = {name: source.info(name) for name in source.names()}
    method = foreign_quantization(source.config, infos, path)
    kind = f"safetensors ({method})" if method else "safetensors"
    try:
        packed = open_packed(source)
    except CheckpointError as error:
        packed, kind = None, f"{kind[:-1]}; cannot be read: {error.what})" if method else kind
    if packed is not None:
        rows = tuple(_packed_rows(packed))
        return Inspection(str(path), kind, packed.config.get("model_type"), rows)
    rows = tuple(_plain_row(name, info) for name, info in infos.items())
    return Inspection(str(path), kind, source.config.get("model_type"), rows)


def _packed_rows(source: PackedSource) -> Iterator[TensorRow]:
    stored, how = source.stored_bytes(), source.quantized()
    for name in source.names():
        info = source.info(name)
        if name in how:
            yield TensorRow(name, how[name].format, info.shape, info.numel, stored[name], True)
        else:
            yield _plain_row(name, info)


def _plain_row(name: str, info: TensorInfo, note: str = "") -> TensorRow:
    label = _FLOAT_NAMES.get(info.dtype, str(info.dtype).removeprefix("torch."))
    if isinstance(info, ForeignInfo):
        label = info.label
    return TensorRow(name, label, info.shape, info.numel, info.nbytes, False, note)


def _inspect_bitfold(path: Path, source: QuantizedSource, quantization: dict[str, Any]) -> Inspection:
    kept = quantization.get("kept", {})
    rows = tuple(_bitfold_rows(source, quantization, kept))
    recipe = tuple(quantization.get("recipe", ()))
    return Inspection(str(path), "bitfold", source.config.get("model_type"), rows, recipe)


def _bitfold_rows(source: QuantizedSource, quantization: dict[str, Any], kept: dict[str, str]) -> Iterator[TensorRow]:
    entries = read_entries(quantization)
    for name in source.names():
        entry = entries.get(name)
        if entry is None:
            yield _plain_row(name, source.info(name), kept.get(name, ""))
            continue
        shape, fields = source.info(name).shape, entry.layout().values()
        note = "" if entry.act == "float" else f"{entry.act} activations"
        nbytes = sum(field.nbytes for field in fields)
        yield TensorRow(name, entry.format.name, shape, prod(shape), nbytes, True, note)


def _inspect_gguf(path: Path, as_model: bool) -> Inspection:
    from bitfold.checkpoints import open_source
    from bitfold.checkpoints.gguf.file import GGML_TYPES
    from bitfold.checkpoints.gguf.parts import GgufParts

    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            open_source(path).close()  # says what is wrong with the file
    file, names = GgufParts(path), _model_names(path) if as_model else {}
    try:
        rows = tuple(
            TensorRow(names.get(t.name, t.name), t.type, t.shape, prod(t.shape), t.nbytes, GGML_TYPES[t.type_id][1] > 1)
            for t in file.tensors.values()
        )
        return Inspection(str(path), "gguf", file.metadata.get("general.architecture"), rows)
    finally:
        file.close()


def _model_names(path: Path) -> dict[str, str]:
    """Name in the file -> name in the model."""
    from bitfold.checkpoints.gguf.source import GgufSource

    source = GgufSource(path)
    try:
        return {source.stored_name(name): name for name in source.names()}
    finally:
        source.close()
