"""What a run and a folder know about themselves."""

from __future__ import annotations
