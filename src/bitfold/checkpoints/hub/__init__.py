"""The Hugging Face Hub."""

from __future__ import annotations
