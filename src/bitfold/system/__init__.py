"""What the rest stands on: the compiled core, threads, memory, progress, units."""

from __future__ import annotations
