"""What will become of every tensor."""

from __future__ import annotations
