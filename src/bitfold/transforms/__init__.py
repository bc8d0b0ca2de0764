"""Transforms: the same function in another basis."""

from __future__ import annotations

from bitfold.transforms.hadamard import Hadamard, read_transform

__all__ = ["Hadamard", "read_transform"]
