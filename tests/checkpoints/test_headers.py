"""What lies where weights should be, told by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitfold.checkpoints.headers import read_header
from bitfold.errors import CheckpointError

FOUND = {
    "nothing": (b"", "the file is empty", "fetch it again"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer", "git lfs"),
    "a page": (b"<!DOCTYPE html><html>Access to this model is restricted</html>", "answer of a server", "licence"),
    "an answer": (b'{"error": "Invalid username or password."}', "answer of a server", "login"),
    "a refusal": (b"Access to model x is restricted.", "answer of a server", "login"),
    "seven bytes": (b"\x10\0\0\0\0\0\0", "truncated", "fetch it again"),
    "a long header": (b"{\x01\0\0\0\0\0\0{}", "truncated", "fetch it again"),  # its length begins like an answer
}


@pytest.mark.parametrize("name", FOUND)
def test_no_weights(name: str, tmp_path: Path) -> None:
    """Downloads leave other things than weights; each is told from a file that was cut off."""
    content, what, hint = FOUND[name]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=what) as raised:
        read_header(file)
    assert hint in (raised.value.hint or "")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_cut_off(share: float, tmp_path: Path) -> None:
    """Wherever a file ends early."""
    file = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.ones(8, 8), "b.weight": torch.ones(4)}, file)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(CheckpointError, match="truncated"):
        read_header(file)
