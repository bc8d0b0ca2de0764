"""What tests of commands share: a finished run, and whether docs/cli.md names the keys that it printed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs" / "cli.md"


@dataclass
class Run:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        return dict(json.loads(self.out))


Bitfold = Callable[..., Run]


def section(command: str) -> str:
    found = re.search(rf"^## bitfold {command}$(.*?)(?=^## |\Z)", DOCS.read_text(encoding="utf-8"), re.M | re.S)
    assert found, f"docs/cli.md has no section on `bitfold {command}`"
    return found[1]


def keys_are_documented(command: str, data: Any) -> None:
    """All keys, in nested objects as well, except those of recipes (keys of a rule), of what is kept, of engines."""
    if isinstance(data, dict):
        for key, value in data.items():
            assert f"`{key}`" in section(command), f"key {key!r} is not documented"
            if key not in ("recipe", "kept", "engines"):
                keys_are_documented(command, value)
    elif isinstance(data, list):
        for value in data:
            keys_are_documented(command, value)
