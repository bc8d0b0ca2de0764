"""Memory, disk and time of a run, before it."""

from __future__ import annotations
