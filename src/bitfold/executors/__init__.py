"""Where tasks run: here, in other processes, on other machines."""

from __future__ import annotations
