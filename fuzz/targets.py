"""Every reader of foreign bytes, as a function of those bytes: it may raise BitfoldError and nothing else.

`check` adds the other two promises: an answer within a second, and no more memory than the input plus 64 MiB. Used by
tests/test_fuzz.py (hypothesis, seconds) and by run.py (coverage-guided, minutes).
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bitfold.checkpoints.bitfold_folder import QuantizedSource, quantization_config
from bitfold.checkpoints.gguf.imatrix import read_imatrix
from bitfold.checkpoints.gguf.source import GgufSource
from bitfold.checkpoints.headers import read_header
from bitfold.checkpoints.manifest import FILE as MANIFEST
from bitfold.checkpoints.manifest import verify
from bitfold.checkpoints.safetensors import SafetensorsSource
from bitfold.checkpoints.schema import read_entries
from bitfold.checkpoints.weight_files import INDEX, SINGLE
from bitfold.errors import BitfoldError
from bitfold.recipes.recipe import Recipe
from bitfold.text.documents import text_pieces

SECONDS = 1.0  # of processor time: a busy machine is nobody's fault
MEMORY = 64 << 20
_LARGEST_READ = 1 << 20  # bytes of a tensor that is read as well, not only described

Target = Callable[[bytes, Path], None]


def header(data: bytes, folder: Path) -> None:
    """A safetensors file."""
    file = folder / SINGLE
    file.write_bytes(data)
    read_header(file)


def index(data: bytes, folder: Path) -> None:
    """A safetensors index beside one sound shard."""
    (folder / INDEX).write_bytes(data)
    SafetensorsSource(folder)


def config(data: bytes, folder: Path) -> None:
    """The config.json of a quantized folder: described, and small tensors read."""
    (folder / "config.json").write_bytes(data)
    found = quantization_config(folder)
    if found is None:
        return
    read_entries(found)
    source = QuantizedSource(folder)
    for name in source.names():
        if source.info(name).nbytes <= _LARGEST_READ:
            source.read(name)


def gguf(data: bytes, folder: Path) -> None:
    """A GGUF file, its tensors and its tokenizer."""
    file = folder / "model.gguf"
    file.write_bytes(data)
    source = GgufSource(file)
    try:
        for name in source.names():
            if source.info(name).nbytes <= _LARGEST_READ:
                source.read(name)
        out = folder / "tokenizer"
        out.mkdir(exist_ok=True)
        source.copy_side_files(out)
    finally:
        source.close()


def imatrix(data: bytes, folder: Path) -> None:
    """An importance matrix, in either form."""
    file = folder / "importance.gguf"
    file.write_bytes(data)
    read_imatrix(file)


def recipe(data: bytes, folder: Path) -> None:
    """A recipe in TOML."""
    file = folder / "recipe.toml"
    file.write_bytes(data)
    Recipe.load(file)


def manifest(data: bytes, folder: Path) -> None:
    """The manifest of a quantized folder, which is checked against it."""
    (folder / MANIFEST).write_bytes(data)
    verify(folder)


def text(data: bytes, folder: Path) -> None:
    """A calibration text in JSON lines."""
    file = folder / "text.jsonl"
    file.write_bytes(data)
    for _ in text_pieces(str(file), split="train", render=lambda talk, *_: str(talk)):
        pass


TARGETS: dict[str, Target] = {
    "header": header,
    "index": index,
    "config": config,
    "gguf": gguf,
    "imatrix": imatrix,
    "recipe": recipe,
    "manifest": manifest,
    "text": text,
}


class Broken(AssertionError):
    """A promise that a reader did not keep."""


def check(name: str, data: bytes, folder: Path) -> None:
    """Run one input; Broken when the reader took too long or too much memory. Other exceptions pass through."""
    _reset_peak()
    before, started = _status("VmRSS"), time.process_time()
    with contextlib.suppress(BitfoldError):
        TARGETS[name](data, folder)
    seconds, grown = time.process_time() - started, _status("VmHWM") - before
    if seconds > SECONDS:
        raise Broken(f"{name}: {seconds:.1f} s for {len(data)} bytes")
    if grown > MEMORY + len(data):
        raise Broken(f"{name}: {grown >> 20} MiB for {len(data)} bytes")


def _reset_peak() -> None:
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status; 0 on other systems, where memory is not checked."""
    if sys.platform != "linux":
        return 0
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def prepare(name: str, folder: Path) -> Path:
    """Put into the folder what the target needs beside the input."""
    from seeds import quantized_folder, shard

    if name == "index":
        (folder / "config.json").write_text("{}")
        (folder / "a.safetensors").write_bytes(shard())
    if name in ("config", "manifest"):
        quantized_folder(folder)
    return folder
