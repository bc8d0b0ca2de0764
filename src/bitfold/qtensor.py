"""QTensor: a quantized weight, complete in itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import prod

import torch

from bitfold.errors import FormatError
from bitfold.formats import AnyFormat


@dataclass(frozen=True)
class QTensor:
    """A weight stored in few bits.

    Args:
        format: the number format.
        shape: shape of the weight, (n, k) or (experts, n, k).
        fields: the stored tensors by name, as `format.layout(shape)` describes them.

    Raises:
        FormatError: a field is missing, superfluous, or has another dtype or shape than the format says.
    """

    format: AnyFormat
    shape: tuple[int, ...]
    fields: Mapping[str, torch.Tensor]

    def __post_init__(self) -> None:
        layout = self.format.layout(self.shape)
        if set(layout) != set(self.fields):
            raise FormatError(f"{self.format.name} stores {sorted(layout)}, not {sorted(self.fields)}")
        for name, info in layout.items():
            field = self.fields[name]
            if field.dtype != info.dtype or tuple(field.shape) != info.shape:
                found = f"{field.dtype} {tuple(field.shape)}"
                raise FormatError(
                    f"field {name!r} of {self.format.name} for a weight of shape {self.shape} must be"
                    f" {info.dtype} {info.shape}, not {found}"
                )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as floating point, of `shape`; exact in float32, rounded once for other dtypes."""
        return self.format.decode(self.fields, self.shape).to(dtype)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """float32 rows (len(index), k) of an (n, k) weight."""
        return self.format.decode_rows(self.fields, self.shape, index)

    def expert(self, index: int) -> QTensor:
        """One (n, k) weight out of an (experts, n, k) stack; shares memory."""
        return QTensor(self.format, self.shape[1:], {name: field[index] for name, field in self.fields.items()})

    @property
    def nbytes(self) -> int:
        """Stored bytes, all fields counted."""
        return sum(field.numel() * field.element_size() for field in self.fields.values())

    @property
    def bpw(self) -> Fraction:
        """Stored bits per weight, exact, all fields counted."""
        return Fraction(8 * self.nbytes, max(1, prod(self.shape)))


def stack(parts: list[QTensor]) -> QTensor:
    """(experts, n, k) out of equally shaped (n, k) weights of one format."""
    first = parts[0]
    fields = {name: torch.stack([p.fields[name] for p in parts]) for name in first.fields}
    return QTensor(first.format, (len(parts), *first.shape), fields)
