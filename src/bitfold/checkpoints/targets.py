"""Kinds of checkpoint that can be written, by name.

Another kind is one file with a class like `SafetensorsFolder`, and a line here.
"""

from __future__ import annotations

from pathlib import Path

from bitfold.checkpoints.base import Source, Target
from bitfold.checkpoints.folder import SafetensorsFolder
from bitfold.checkpoints.gguf.target import GgufModel
from bitfold.checkpoints.packed.to_compressed import CompressedFolder
from bitfold.checkpoints.packed.to_gptq import AutoRoundFolder, AwqFolder, GptqFolder
from bitfold.checkpoints.packed.written import PackedFolder
from bitfold.errors import UsageError

FOLDER, GGUF = "safetensors", "gguf"
# Folders for other engines.
ENGINES: dict[str, type[PackedFolder]] = {
    "compressed-tensors": CompressedFolder,
    "gptq": GptqFolder,
    "awq": AwqFolder,
    "auto-round": AutoRoundFolder,
}
TARGETS: dict[str, type[Target]] = {FOLDER: SafetensorsFolder, GGUF: GgufModel, **ENGINES}


def open_target(kind: str, folder: Path, max_shard_bytes: int | None, source: Source | None = None) -> Target:
    """A checkpoint of that kind, to be written into a folder; nothing is written before `layout`.

    Args:
        kind: of TARGETS, its variant after a colon: gguf:Q4_K_M.
        folder: which need not be there yet where only sizes are asked for.
        max_shard_bytes: size at which a new file is begun; None: as is usual of the kind.
        source: what it is made of, for kinds that hold config and tokenizer as well.

    Raises:
        UsageError: an unknown kind.
    """
    name, _, variant = kind.partition(":")
    if name not in TARGETS:
        raise UsageError(f"unknown kind of checkpoint {name!r}", hint=f"one of {', '.join(TARGETS)}")
    return TARGETS[name](folder, max_shard_bytes, source, variant)
