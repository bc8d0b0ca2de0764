"""Formats that are more than a grid and scales: trellis, lattice, additive codebooks, ggml."""

from __future__ import annotations
