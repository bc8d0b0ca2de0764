"""Transforms: the same function in another basis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bitfold.errors import ModelError, UsageError
from bitfold.system.tensorinfo import TensorInfo
from bitfold.transforms.diagonal import Diagonal, aware_scale, smooth_scale
from bitfold.transforms.hadamard import Hadamard

__all__ = [
    "Diagonal",
    "Hadamard",
    "Transform",
    "TransformSpec",
    "aware_scale",
    "read_transform",
    "smooth_scale",
    "transform_spec",
]


class Transform(Protocol):
    """A change of basis of the inputs of a layer; the product of activations and weights stays as it was."""

    @property
    def size(self) -> int: ...
    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...
    def weights(self, w: torch.Tensor) -> torch.Tensor: ...
    def inverse(self, w: torch.Tensor) -> torch.Tensor: ...
    def hessian(self, h: torch.Tensor) -> torch.Tensor: ...
    def describe(self) -> dict[str, Any]: ...
    def layout(self) -> dict[str, TensorInfo]: ...
    def fields(self) -> dict[str, torch.Tensor]: ...
    def with_fields(self, fields: Mapping[str, torch.Tensor]) -> Transform: ...


def read_transform(text: Mapping[str, Any] | None) -> Transform | None:
    """The transform that a checkpoint describes; ModelError for one that is not known."""
    if text is None:
        return None
    if text.get("kind") == "hadamard":
        return Hadamard(int(text["size"]), int(text["seed"]))
    if text.get("kind") == "diagonal":
        return Diagonal(int(text["size"]))
    raise ModelError(f"unknown transform {text.get('kind')!r}", hint="a newer bitfold may know it")


@dataclass(frozen=True)
class TransformSpec:
    """What a rule wants.

    Args:
        kind: "none", "hadamard", "smooth" or "awq".
        alpha: of "smooth".
    """

    kind: str
    alpha: float = 0.5

    @property
    def changes_basis(self) -> bool:
        """Whether it is one at all."""
        return self.kind != "none"

    @property
    def rotates(self) -> bool:
        """Whether inputs are mixed with each other."""
        return self.kind == "hadamard"

    @property
    def diagonal(self) -> bool:
        """Whether factors of input channels have to be found, which takes calibration text."""
        return self.kind in ("smooth", "awq")


def transform_spec(text: str) -> TransformSpec:
    """`none`, `hadamard`, `smooth`, `smooth:0.85` or `awq`.

    Raises:
        UsageError: anything else.
    """
    kind, _, number = text.partition(":")
    if text in ("none", "hadamard", "smooth", "awq"):
        return TransformSpec(kind)
    if kind != "smooth":
        raise UsageError(f"unknown transform {text!r}", hint="none, hadamard, smooth, smooth:0.85 or awq")
    try:
        alpha = float(number)
    except ValueError:
        alpha = -1.0
    if not 0 <= alpha <= 1:
        raise UsageError(f"{number!r} is no migration strength", hint="0 to 1, as in smooth:0.5")
    return TransformSpec(kind, alpha)
