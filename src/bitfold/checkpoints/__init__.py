"""Checkpoints: lazy readers and careful writers, one tensor at a time."""

from __future__ import annotations

from pathlib import Path

from bitfold.checkpoints.base import Source, TensorInfo
from bitfold.checkpoints.convert import convert
from bitfold.errors import CheckpointError, UsageError

__all__ = ["Source", "TensorInfo", "convert", "find_checkpoint", "open_source"]


def open_source(path: str | Path, *, pre_tokenizer: str | None = None) -> Source:
    """Open a local checkpoint for reading, whatever it is: a safetensors folder, plain or packed by another
    program, a bitfold folder, a GGUF file or folder.

    Args:
        path: where it is.
        pre_tokenizer: of a GGUF file, by which rule its tokenizer cuts text, whatever the file says.

    Raises:
        UsageError: a pre-tokenizer of no known name, or for something that is no GGUF file.
        CheckpointError: nothing there, or nothing that can be read, as weights that another program packed in a way
            not known here; the message says what to do.
    """
    path = find_checkpoint(Path(path))
    if path.is_file():
        return _open_file(path, pre_tokenizer)
    if pre_tokenizer is not None:
        raise UsageError("only of a GGUF file is it to be said", where="--pre-tokenizer")
    from bitfold.checkpoints.bitfold_folder import QuantizedSource, quantization_config
    from bitfold.checkpoints.foreign import refuse_foreign
    from bitfold.checkpoints.packed import open_packed
    from bitfold.checkpoints.safetensors import SafetensorsSource

    if quantization_config(path) is not None:
        return QuantizedSource(path)
    source = SafetensorsSource(path)
    if (packed := open_packed(source)) is not None:
        return packed
    refuse_foreign(source.config, {name: source.info(name) for name in source.names()}, path)
    return source


def find_checkpoint(path: Path) -> Path:
    """The GGUF file of a folder that has no other weights; else the path itself.

    Raises:
        CheckpointError: several GGUF models in the folder.
    """
    if not path.is_dir() or any(path.glob("*.safetensors")) or not any(path.glob("*.gguf")):
        return path
    from bitfold.checkpoints.gguf.parts import model_in

    return model_in(path) or path


def _open_file(path: Path, pre_tokenizer: str | None) -> Source:
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic == b"GGUF":
        from bitfold.checkpoints.gguf.source import GgufSource

        return GgufSource(path, pre_tokenizer=pre_tokenizer)
    if path.suffix == ".safetensors":
        raise CheckpointError(
            "is a single file of weights", where=str(path), hint="name the folder that holds it and its config.json"
        )
    raise CheckpointError(
        "is neither a model folder nor a GGUF file",
        where=str(path),
        hint="pickled weights (.bin, .pt) are refused: save the model with safetensors",
    )
