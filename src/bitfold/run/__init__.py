"""One run, from options to a folder."""

from __future__ import annotations
