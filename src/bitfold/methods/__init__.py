"""Methods: which scales, which codes."""

from __future__ import annotations
