"""What is asked for: rules, options, methods by the names of the field."""

from __future__ import annotations
