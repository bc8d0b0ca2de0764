"""What is in a repository of the local Hub, and the small checkpoints that the tests put there."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

INDEX = "model.safetensors.index.json"
LFS_SUFFIXES = (".safetensors", ".gguf", ".bin")


@dataclass
class Repo:
    """A repository: every commit is a complete mapping from path to content."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        """Record `files` as the whole content of `branch`; returns the commit's id."""
        digest = hashlib.sha1(repr((len(self.commits), branch, message)).encode())
        for path in sorted(files):
            digest.update(path.encode() + git_oid(files[path]).encode())
        sha = digest.hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def find(self, revision: str) -> str | None:
        """The commit that a branch, or a commit id, means."""
        return revision if revision in self.commits else self.branches.get(revision)


def git_oid(content: bytes) -> str:
    """The id git gives a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    """The id Git LFS gives a blob."""
    return hashlib.sha256(content).hexdigest()


def is_lfs(path: str) -> bool:
    """Whether the Hub keeps such a file out of git."""
    return path.endswith(LFS_SUFFIXES)


def tree_entry(path: str, content: bytes) -> dict[str, Any]:
    """How the Hub lists one file."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
    if is_lfs(path):
        entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
    return entry


def preupload(path: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """How a file must be sent, and what the repository holds under its name already."""
    oid = None if path not in files else sha256(files[path]) if is_lfs(path) else git_oid(files[path])
    return {"path": path, "uploadMode": "lfs" if is_lfs(path) else "regular", "oid": oid}


class Clock:
    """Stands in for the `time` module: does not sleep, remembers for how long it was asked to."""

    time = staticmethod(time.time)

    def __init__(self) -> None:
        self.waits: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)


def shard(*names: str, size: int = 64) -> bytes:
    """A safetensors file with a few float32 tensors of `size` elements."""
    return save({name: torch.arange(size, dtype=torch.float32) for name in names})


def index(**shards: list[str]) -> bytes:
    """The index that says which tensor is in which shard (`a` stands for `model-a.safetensors`)."""
    return json.dumps(
        {"weight_map": {t: f"model-{s}.safetensors" for s, names in shards.items() for t in names}}
    ).encode()


def model(size: int = 64) -> dict[str, bytes]:
    """The files of a small repository."""
    return {"config.json": b'{"model_type": "llama"}', "model.safetensors": shard("w", size=size)}


def sharded(size: int = 64) -> dict[str, bytes]:
    """The same with its weights in two files."""
    weights = {f"model-{s}.safetensors": shard(s, size=size) for s in ("a", "b")}
    return {"config.json": b"{}", INDEX: index(a=["a"], b=["b"]), **weights}


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder).as_posix()) for p in folder.rglob("*") if p.is_file()}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder
