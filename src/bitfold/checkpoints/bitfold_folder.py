"""bitfold's own checkpoint: an ordinary Hugging Face folder with a `quantization_config`.

    "quantization_config": {
      "quant_method": "bitfold", "version": 1, "bitfold": "0.1.0",
      "formats": {"int4-asym-g64": {... what the codes and scales mean ...}},
      "tensors": {"model.layers.0.mlp.up_proj.weight": {"format": "int4-asym-g64", "shape": [1536, 576]}, ...},
      "kept":    {"lm_head.weight": "output head, kept by default", ...},
      "unused":  ["tensors of the source that the model class has no place for"],
      "recipe":  [{"match": "*", "format": "int4-asym-g64", ...}]
    }

The tensor X is stored as X.codes, X.scale ... . docs/format.md is the specification.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bitfold.checkpoints.base import StoredAs
from bitfold.checkpoints.safetensors import SafetensorsSource, read_config
from bitfold.checkpoints.schema import QUANTIZATION, Content, own_quantization, read_entries, stored_name
from bitfold.errors import CheckpointError
from bitfold.qtensor import QTensor
from bitfold.system.tensorinfo import TensorInfo


def quantization_config(folder: Path) -> dict[str, Any] | None:
    """The quantization_config of a folder that bitfold wrote; None for other folders.

    Raises:
        CheckpointError: written by a newer version of the format.
    """
    return own_quantization(read_config(folder), str(folder))


def stored_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a folder as they are stored, one at a time, views of the files where possible."""
    source = SafetensorsSource(folder)
    by_file: dict[Path, list[str]] = {}
    for name in source.names():
        by_file.setdefault(source._where[name], []).append(name)
    for file, names in by_file.items():
        try:
            with safe_open(str(file), framework="pt") as handle:
                for name in names:
                    yield name, handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot be read: {error}", where=str(file)) from error


def stored_layouts(folder: Path) -> dict[str, TensorInfo]:
    """dtype and shape of every field of every quantized tensor, as the config of a folder says."""
    entries = QuantizedSource(folder).entries
    return {name: info for tensor, entry in entries.items() for name, info in entry.stored(tensor).items()}


class QuantizedSource:
    """A bitfold folder as a `Source` of ordinary tensors: quantized ones come out dequantized, in float32."""

    read_rows: None = None  # rows of packed codes are not rows of bytes
    model_dtype: None = None
    packed: None = None  # `bitfold.load` knows more of such folders

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        found = quantization_config(self.path)
        if found is None:
            raise CheckpointError(
                "was not written by bitfold", where=str(path), hint="`bitfold quantize` makes such folders"
            )
        self.quantization: Mapping[str, Any] | None = found
        self.entries = read_entries(found, str(path))
        self._stored = SafetensorsSource(self.path)
        self.config = {k: v for k, v in self._stored.config.items() if k != QUANTIZATION}
        self._fields = {stored for name, entry in self.entries.items() for stored in entry.stored(name)}

    @property
    def files(self) -> list[Path]:
        """See `Source`."""
        return self._stored.files

    def names(self) -> list[str]:
        """Names of the model's tensors, quantized or not."""
        return [*self.entries, *(n for n in self._stored.names() if n not in self._fields)]

    def info(self, name: str) -> TensorInfo:
        """float32 for quantized tensors, what is stored for the others."""
        if (entry := self.entries.get(name)) is None:
            return self._stored.info(name)
        return TensorInfo(torch.float32, entry.model_shape)

    def qtensor(self, name: str) -> QTensor:
        """A quantized tensor as it is stored.

        Raises:
            CheckpointError: a field is missing or has another shape than the format says.
        """
        entry = self.entries[name]
        return QTensor(entry.format, entry.shape, self._read_fields(name, entry.format.layout(entry.shape)))

    def _read_fields(self, name: str, layout: Mapping[str, TensorInfo]) -> dict[str, torch.Tensor]:
        fields: dict[str, torch.Tensor] = {}
        for field, expected in layout.items():
            full = stored_name(name, field)
            if full not in self._stored.names() or self._stored.info(full) != expected:
                raise CheckpointError(f"{full} is missing or misshapen", where=str(self.path))
            fields[field] = self._stored.read(full)
        return fields

    def read(self, name: str) -> torch.Tensor:
        """The tensor, dequantized if it is quantized."""
        if (entry := self.entries.get(name)) is None:
            return self._stored.read(name)
        w = self.qtensor(name).dequantize()
        if entry.transform is not None:
            w = entry.transform.with_fields(self._read_fields(name, entry.sides())).inverse(w)
        return entry.restored(w)

    def content(self, name: str) -> Content:
        """See `Source`."""
        return self.entries.get(name) or self._stored.info(name)

    def fields(self, name: str) -> dict[str, torch.Tensor]:
        """See `Source`."""
        return self._read_fields(name, self.entries[name].layout())

    def quantized(self) -> dict[str, StoredAs]:
        """See `Source`; bits of the codes and scales, without what a transform stores beside them."""
        layouts = {name: entry.format.layout(entry.shape) for name, entry in self.entries.items()}
        bits = {name: 8 * sum(field.nbytes for field in layout.values()) for name, layout in layouts.items()}
        return {name: StoredAs(e.format.name, bits[name] / prod(e.shape)) for name, e in self.entries.items()}

    def stored_bytes(self) -> dict[str, int]:
        """Bytes of every stored field and tensor."""
        return self._stored.stored_bytes()

    def folded(self) -> dict[str, str]:
        """None."""
        return {}

    def data_bytes(self) -> int:
        """Sizes of the files without their headers."""
        return self._stored.data_bytes()

    def unread(self) -> list[str]:
        """Files of weights that do not belong to it."""
        return self._stored.unread()

    def fingerprint(self) -> dict[str, Any]:
        """As of any folder of safetensors."""
        return self._stored.fingerprint()

    def copy_side_files(self, out_dir: Path) -> list[str]:
        """Tokenizer and the like."""
        return self._stored.copy_side_files(out_dir)

    def generation_config(self) -> dict[str, Any]:
        """See `Source`."""
        return self._stored.generation_config()

    def tokenizer(self, *, plain: bool = False) -> Any:
        """See `Source`."""
        return self._stored.tokenizer(plain=plain)

    def close(self) -> None:
        """Nothing stays open between reads."""
