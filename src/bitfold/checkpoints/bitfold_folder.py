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
from bitfold.checkpoints.untrusted import shape_of
from bitfold.errors import CheckpointError
from bitfold.formats import AnyFormat, read_description
from bitfold.qtensor import QTensor
from bitfold.system.tensorinfo import TensorInfo
from bitfold.transforms import read_transform
from bitfold.transforms.activations import read_act

QUANT_METHOD = "bitfold"
VERSION = 1
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, AssertionError, RecursionError, ArithmeticError)


def quantization_config(folder: Path) -> dict[str, Any] | None:
    """The quantization_config of a folder that bitfold wrote; None for other folders.

    Raises:
        CheckpointError: written by a newer version of the format.
    """
    config = read_config(folder).get("quantization_config")
    if not isinstance(config, dict) or config.get("quant_method") != QUANT_METHOD:
        return None
    if config.get("version") != VERSION:
        raise CheckpointError(
            f"was written in version {config.get('version')} of the format, this is version {VERSION}",
            where=str(folder),
            hint="pip install -U bitfold",
        )
    return config


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
    source = QuantizedSource(folder)
    both = [*source._layouts.items(), *source._sides.items()]
    return {f"{name}.{field}": info for name, layout in both for field, info in layout.items()}


def _sides(entry: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Tensors beside the codes: factors of input channels, the scale of static activations."""
    transform = read_transform(entry.get("transform"))
    return {**({} if transform is None else transform.layout()), **read_act(str(entry.get("act", "float"))).layout()}


class QuantizedSource:
    """A bitfold folder as a `Source` of ordinary tensors: quantized ones come out dequantized, in float32."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        found = quantization_config(self.path)
        if found is None:
            raise CheckpointError(
                "was not written by bitfold", where=str(path), hint="`bitfold quantize` makes such folders"
            )
        self.quantization = found
        self._stored = SafetensorsSource(self.path)
        self.config = {k: v for k, v in self._stored.config.items() if k != "quantization_config"}
        try:
            self._formats: dict[str, AnyFormat] = {n: read_description(n, d) for n, d in found["formats"].items()}
            self._tensors: Mapping[str, Any] = found["tensors"]
            self._layouts = {name: self._layout(entry) for name, entry in self._tensors.items()}
            self._sides = {name: _sides(entry) for name, entry in self._tensors.items()}
            both = [*self._layouts.items(), *self._sides.items()]
            self._fields = {f"{t}.{f}" for t, layout in both for f in layout}
        except _DAMAGE as error:
            raise CheckpointError(f"the quantization_config is damaged: {error!r}", where=str(path)) from error

    def _layout(self, entry: Mapping[str, Any]) -> dict[str, TensorInfo]:
        """The fields of a tensor; ValueError and the like where the entry makes no sense."""
        shape = shape_of(entry["shape"])
        transform = read_transform(entry.get("transform"))
        if len(shape) not in (2, 3) or 0 in shape or (transform is not None and transform.size != shape[-1]):
            raise ValueError(f"shape {shape}, transform {transform}")
        return self._formats[entry["format"]].layout(shape)

    @property
    def files(self) -> list[Path]:
        """See `Source`."""
        return self._stored.files

    def names(self) -> list[str]:
        """Names of the model's tensors, quantized or not."""
        return [*self._tensors, *(n for n in self._stored.names() if n not in self._fields)]

    def info(self, name: str) -> TensorInfo:
        """float32 for quantized tensors, what is stored for the others."""
        if name not in self._tensors:
            return self._stored.info(name)
        *lead, n, k = self._tensors[name]["shape"]
        flip = self._tensors[name].get("transposed", False)
        return TensorInfo(torch.float32, (*lead, k, n) if flip else (*lead, n, k))

    def qtensor(self, name: str) -> QTensor:
        """A quantized tensor as it is stored.

        Raises:
            CheckpointError: a field is missing or has another shape than the format says.
        """
        entry = self._tensors[name]
        fields = self._read_fields(name, self._layouts[name])
        return QTensor(self._formats[entry["format"]], tuple(entry["shape"]), fields)

    def _read_fields(self, name: str, layout: Mapping[str, TensorInfo]) -> dict[str, torch.Tensor]:
        fields: dict[str, torch.Tensor] = {}
        for field, expected in layout.items():
            full = f"{name}.{field}"
            if full not in self._stored.names() or self._stored.info(full) != expected:
                raise CheckpointError(f"{full} is missing or misshapen", where=str(self.path))
            fields[field] = self._stored.read(full)
        return fields

    def read(self, name: str) -> torch.Tensor:
        """The tensor, dequantized if it is quantized."""
        if name not in self._tensors:
            return self._stored.read(name)
        w = self.qtensor(name).dequantize()
        transform = read_transform(self._tensors[name].get("transform"))
        if transform is not None:
            w = transform.with_fields(self._read_fields(name, self._sides[name])).inverse(w)
        return w.transpose(-1, -2).contiguous() if self._tensors[name].get("transposed", False) else w

    def quantized(self) -> dict[str, StoredAs]:
        """See `Source`; bits of the codes and scales, without what a transform stores beside them."""
        bits = {n: 8 * sum(field.nbytes for field in layout.values()) for n, layout in self._layouts.items()}
        return {n: StoredAs(e["format"], bits[n] / prod(e["shape"])) for n, e in self._tensors.items()}

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

    def tokenizer(self) -> Any:
        """See `Source`."""
        return self._stored.tokenizer()

    def close(self) -> None:
        """Nothing stays open between reads."""
