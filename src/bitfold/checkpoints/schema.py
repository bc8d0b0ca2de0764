"""What bitfold writes into a config.json about each quantized tensor, in one place.

docs/format.md is the specification.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bitfold.checkpoints.untrusted import shape_of
from bitfold.errors import BitfoldError, CheckpointError
from bitfold.formats import AnyFormat, read_description
from bitfold.qtensor import QTensor
from bitfold.system.tensorinfo import TensorInfo
from bitfold.transforms import Transform, read_transform
from bitfold.transforms.activations import read_act
from bitfold.version import __version__

QUANTIZATION = "quantization_config"  # the entry of config.json
QUANT_METHOD = "bitfold"
VERSION = 1
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, AssertionError, RecursionError, ArithmeticError)


def stored_name(tensor: str, field: str) -> str:
    """The name that a field of a packed tensor has in a bitfold folder."""
    return f"{tensor}.{field}"


@dataclass(frozen=True)
class Entry:
    """What a checkpoint says of one quantized tensor.

    Args:
        format: of its codes.
        shape: (n, k) or (experts, n, k), inputs last.
        act: activations, by name.
        transposed: the model has (..., k, n).
        transform: of the inputs.
        flat: the model has the experts one upon the other, in the rows of a matrix.
    """

    format: AnyFormat
    shape: tuple[int, ...]
    act: str = "float"
    transposed: bool = False
    transform: Transform | None = None
    flat: bool = False

    @property
    def model_shape(self) -> tuple[int, ...]:
        """Shape of the tensor of the model."""
        *lead, n, k = self.shape
        whole = (*lead, k, n) if self.transposed else (*lead, n, k)
        return (whole[0] * whole[1], whole[2]) if self.flat else whole

    def restored(self, w: torch.Tensor) -> torch.Tensor:
        """Decoded weights (of `shape`) as the model has them."""
        return (w.mT if self.transposed else w).reshape(self.model_shape).contiguous()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        text: dict[str, Any] = {"format": self.format.name, "shape": list(self.shape)}
        if self.act != "float":
            text["act"] = self.act
        if self.transposed:
            text["transposed"] = True
        if self.flat:
            text["flat"] = True
        if self.transform is not None:
            text["transform"] = self.transform.describe()
        return text

    def sides(self) -> dict[str, TensorInfo]:
        """Tensors beside the codes: factors of input channels, the scale of static activations."""
        return {**({} if self.transform is None else self.transform.layout()), **read_act(self.act).layout()}

    def layout(self) -> dict[str, TensorInfo]:
        """dtype and shape of every stored field, those beside the weight included."""
        return {**self.format.layout(self.shape), **self.sides()}

    @property
    def nbytes(self) -> int:
        """Bytes of all fields."""
        return sum(info.nbytes for info in self.layout().values())

    def stored(self, name: str) -> dict[str, TensorInfo]:
        """The fields of the tensor of that name, by the names that they have in a bitfold folder."""
        return {stored_name(name, field): info for field, info in self.layout().items()}

    def meta(self) -> QTensor:
        """A QTensor of this kind on the meta device."""
        layout = self.format.layout(self.shape)
        fields = {name: torch.empty(i.shape, dtype=i.dtype, device="meta") for name, i in layout.items()}
        return QTensor(self.format, self.shape, fields)


Content = TensorInfo | Entry  # what a tensor of a model is stored as: plain numbers, or packed


def describe(
    entries: Mapping[str, Entry], kept: Mapping[str, str], unused: Iterable[str] = (), **more: Any
) -> dict[str, Any]:
    """The `quantization_config` of a bitfold folder.

    Args:
        entries: of every quantized tensor.
        kept: the other tensors, and why each was kept.
        unused: tensors of the source that the model class has no place for.
        more: what else is known of how it came about: `recipe`, `activations`.
    """
    return {
        "quant_method": QUANT_METHOD,
        "version": VERSION,
        "bitfold": __version__,
        "formats": {e.format.name: e.format.describe() for e in entries.values()},
        "tensors": {name: entry.to_dict() for name, entry in entries.items()},
        "kept": dict(kept),
        "unused": list(unused),
        **more,
    }


def own_quantization(config: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """The `quantization_config` within a config.json that bitfold wrote; None in others.

    Raises:
        CheckpointError: written by a newer version of the format.
    """
    said = config.get(QUANTIZATION)
    if not isinstance(said, dict) or said.get("quant_method") != QUANT_METHOD:
        return None
    if said.get("version") != VERSION:
        what = f"was written in version {said.get('version')} of the format, this is version {VERSION}"
        raise CheckpointError(what, where=where, hint="pip install -U bitfold")
    return said


def read_entries(quantization: Mapping[str, Any], where: str = "config.json") -> dict[str, Entry]:
    """Entries of a `quantization_config` by tensor name; CheckpointError when they make no sense."""
    try:
        formats = {name: read_description(name, text) for name, text in quantization["formats"].items()}
        return {name: _read_entry(entry, formats) for name, entry in quantization["tensors"].items()}
    except BitfoldError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(f"the quantization_config is damaged: {error!r}", where=where) from error


def _read_entry(entry: Mapping[str, Any], formats: Mapping[str, AnyFormat]) -> Entry:
    shape, transform = shape_of(entry["shape"]), read_transform(entry.get("transform"))
    if len(shape) not in (2, 3) or 0 in shape or (transform is not None and transform.size != shape[-1]):
        raise ValueError(f"shape {shape}, transform {transform}")
    act = str(entry.get("act", "float"))
    transposed, flat = (bool(entry.get(key, False)) for key in ("transposed", "flat"))
    if flat and len(shape) != 3:
        raise ValueError(f"a flat stack of shape {shape}")
    found = Entry(formats[entry["format"]], shape, act, transposed, transform, flat)
    found.layout()  # raises where a format cannot have such a shape
    return found
