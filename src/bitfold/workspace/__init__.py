"""Where an unfinished run lives, what it has done, and what it tells."""

from __future__ import annotations
