"""Keys and values of a prompt on disk, so that the next process need not read it again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bitfold.engine.decoder import Decoder
from bitfold.errors import CheckpointError
from bitfold.system import progress
from bitfold.system.outputs import try_file

_VERSION = "1"
_SAMPLE = 1 << 16  # bytes of each tensor that tell one model from another
_VOLATILE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


class PromptCache:
    """A file with the keys and values of one prompt.

    A file of another model, another way to keep keys and values, or one that is damaged is not used, and one line says
    so; it is written anew.

    Args:
        path: the file; it need not be there.
        model: whose keys and values they are.

    Raises:
        UsageError, CheckpointError: there can be no such file.
    """

    def __init__(self, path: str | Path, model: nn.Module) -> None:
        self._path = try_file(path)
        self._model = _fingerprint(model)

    def load(self, decoder: Decoder) -> None:
        """What the file holds becomes the first sequence's text, if that is empty and has room for it."""
        if decoder.ids or not self._path.exists() or self._path.stat().st_size == 0:
            return
        try:
            with safe_open(self._path, framework="pt") as file:
                tokens, cache = file.get_tensor("tokens"), file.get_tensor("cache")
                stored = (file.metadata() or {}).get("hash")
            if stored != self._hash(tokens, decoder):
                raise ValueError("it is of another model, or of another kind of cache")
            decoder.load(tokens.tolist(), cache)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            progress.say(f"{self._path.name} is not used, the prompt is read: {error}")

    def save(self, decoder: Decoder) -> None:
        """Write the first sequence, aside first: another process never sees half a file.

        Raises:
            CheckpointError: the disk is full, or the folder is gone.
        """
        tokens = torch.tensor(decoder.ids, dtype=torch.int32)
        aside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            save_file(
                {"tokens": tokens, "cache": decoder.saved()}, aside, metadata={"hash": self._hash(tokens, decoder)}
            )
            aside.replace(self._path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"the prompt cache cannot be written: {error}", where=str(self._path)) from error
        finally:
            with contextlib.suppress(OSError):
                aside.unlink()

    def _hash(self, tokens: Tensor, decoder: Decoder) -> str:
        text = json.dumps([_VERSION, self._model, decoder.cache, tokens.tolist()])
        return hashlib.sha256(text.encode()).hexdigest()


def _fingerprint(model: nn.Module) -> str:
    """Of a model: its class, its config, and some bytes of every tensor."""
    found = hashlib.sha256(type(model).__name__.encode())
    config = model.config.to_dict()  # type: ignore[operator, union-attr]
    kept = {name: value for name, value in config.items() if name not in _VOLATILE}
    found.update(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, tensor in _tensors(model):
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        step = max(1, len(raw) // _SAMPLE)
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(raw[::step].contiguous().numpy().tobytes())
    return found.hexdigest()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from sorted((name, tensor) for name, tensor in model.state_dict().items() if tensor.numel())
