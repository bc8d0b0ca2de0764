"""What bitfold writes into a config.json about each quantized tensor, in one place.

docs/format.md is the specification.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bitfold.errors import BitfoldError, ModelError
from bitfold.formats import AnyFormat, read_description
from bitfold.qtensor import QTensor
from bitfold.system.tensorinfo import TensorInfo
from bitfold.transforms import Transform, read_transform
from bitfold.transforms.activations import read_act


@dataclass(frozen=True)
class Entry:
    """What a checkpoint says of one quantized tensor."""

    format: AnyFormat
    shape: tuple[int, ...]
    act: str = "float"
    transposed: bool = False
    transform: Transform | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        text: dict[str, Any] = {"format": self.format.name, "shape": list(self.shape)}
        if self.act != "float":
            text["act"] = self.act
        if self.transposed:
            text["transposed"] = True
        if self.transform is not None:
            text["transform"] = self.transform.describe()
        return text

    def layout(self) -> dict[str, TensorInfo]:
        """dtype and shape of every stored field, those beside the weight included."""
        sides = {} if self.transform is None else self.transform.layout()
        return {**self.format.layout(self.shape), **sides, **read_act(self.act).layout()}

    def meta(self) -> QTensor:
        """A QTensor of this kind on the meta device."""
        layout = self.format.layout(self.shape)
        fields = {name: torch.empty(i.shape, dtype=i.dtype, device="meta") for name, i in layout.items()}
        return QTensor(self.format, self.shape, fields)


def read_entries(config: Mapping[str, Any]) -> dict[str, Entry]:
    """Entries of a `quantization_config` by tensor name; ModelError when they make no sense."""
    try:
        formats = {name: read_description(name, text) for name, text in config["formats"].items()}
        return {
            name: Entry(
                formats[e["format"]],
                tuple(int(d) for d in e["shape"]),
                e.get("act", "float"),
                e.get("transposed", False),
                read_transform(e.get("transform")),
            )
            for name, e in config["tensors"].items()
        }
    except BitfoldError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, ArithmeticError) as error:
        raise ModelError(f"the quantization_config is damaged: {error!r}", where="config.json") from error
