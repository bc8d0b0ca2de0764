"""Downcasts: weights as plain 16-bit or 32-bit floats, no codes, no scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from bitfold.errors import FormatError
from bitfold.formats.base import Params
from bitfold.system.tensorinfo import TensorInfo


@dataclass(frozen=True)
class Cast:
    """A float dtype as a format; its one field `values` is the weight itself.

    A checkpoint stores such a weight as an ordinary tensor (`plain`), which any program can read.
    """

    name: str
    dtype: torch.dtype
    plain = True
    scale = grid = levels = code = books = magnitudes = ggml = rescaled = weighted = rows_at_once = None

    @property
    def bits(self) -> Fraction:
        """Bits of a number."""
        return Fraction(self.dtype.itemsize * 8)

    @property
    def bpw(self) -> Fraction:
        """Bits per weight."""
        return self.bits

    @property
    def span(self) -> tuple[float, float]:
        """Smallest and largest finite value."""
        info = torch.finfo(self.dtype)
        return info.min, info.max

    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        """The one field."""
        return {"values": TensorInfo(self.dtype, tuple(shape))}

    def encode(self, w: torch.Tensor, params: Params | None) -> dict[str, torch.Tensor]:
        """Round to nearest even; FormatError when a weight exceeds the range of the dtype."""
        values = w.to(self.dtype)
        if not torch.isfinite(values).all():
            raise FormatError(f"a weight exceeds the range of {self.name}, {self.span[1]:g}", hint="bf16 has the range")
        return {"values": values}

    def decode(self, fields: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """float32 weight."""
        return fields["values"].float()

    def decode_rows(
        self, fields: Mapping[str, torch.Tensor], shape: tuple[int, ...], index: torch.Tensor
    ) -> torch.Tensor:
        """float32 rows of the weight."""
        return fields["values"][index].float()

    def decode_columns(
        self, fields: Mapping[str, torch.Tensor], shape: tuple[int, ...], index: torch.Tensor
    ) -> torch.Tensor:
        """float32 columns of the weight."""
        return fields["values"][:, index].float()

    def coder(self, w: torch.Tensor, params: Params | None, importance: torch.Tensor | None = None) -> CastCoder:
        """Rounds the columns of w (n, k) one by one."""
        return CastCoder(self, torch.empty(tuple(w.shape), dtype=self.dtype, device=w.device))

    def describe(self) -> dict[str, Any]:
        """JSON-able description."""
        return {"family": "cast", "dtype": str(self.dtype).removeprefix("torch.")}


@dataclass(frozen=True)
class CastCoder:
    """Columns of a downcast, see `Coder`."""

    format: Cast
    values: torch.Tensor
    step = 1
    at_once = 0
    feed = under = refit = None

    def encode(self, w: torch.Tensor, start: int) -> torch.Tensor:
        """See `Coder`."""
        rounded = self.format.encode(w, None)["values"]
        self.values[:, start : start + w.shape[1]] = rounded
        return rounded.float()

    def fields(self) -> dict[str, torch.Tensor]:
        """See `Coder`."""
        return {"values": self.values}
