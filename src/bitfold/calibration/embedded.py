"""What comes before the blocks, with as little of it in memory as the text needs.

The embedding of a large vocabulary is among the largest tensors of a model; of its rows only those of the tokens that
occur are read. Other modules are filled when they are about to run, so that an output layer never is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import nn

from bitfold.errors import ModelError


class Tensors(Protocol):
    """Tensors of a model by name."""

    @property
    def read_rows(self) -> Callable[[str, torch.Tensor], torch.Tensor] | None: ...
    def read(self, name: str) -> torch.Tensor: ...
    def __contains__(self, name: object) -> bool: ...


class Filled:
    """While this is open, modules outside the blocks have their weights, float32, once they run.

    Args:
        model: on the meta device.
        source: its tensors; asked for some rows where it can read them.
        ids: the tokens that will come.
        skip: modules below this prefix are left alone.
    """

    def __init__(self, model: nn.Module, source: Tensors, ids: torch.Tensor, *, skip: str) -> None:
        self._model, self._source, self._skip = model, source, skip
        self._tokens = torch.tensor(sorted(set(ids.flatten().tolist())))
        self._handles: list[Any] = []
        self._padded: list[tuple[Any, int | None]] = []
        self._emptied: list[tuple[nn.Module, str, nn.Parameter | torch.Tensor]] = []

    def __enter__(self) -> Filled:
        try:
            self._open()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _open(self) -> None:
        getter = getattr(self._model, "get_input_embeddings", None)
        embedding = getter() if callable(getter) else None
        for path, module in self._model.named_modules():
            if f"{path}.".startswith(self._skip) or not (module._parameters or module._buffers):
                continue
            compact = module is embedding and isinstance(module, nn.Embedding) and path + ".weight" in self._source
            hook = self._compact(path, module) if compact else self._whole(path)
            self._handles.append(module.register_forward_pre_hook(hook))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for module, padding in self._padded:
            module.padding_idx = padding
        for module, name, old in self._emptied:
            holder: Any = module._buffers if name in module._buffers else module._parameters
            holder[name] = old

    def _whole(self, path: str) -> Any:
        prefix = f"{path}." if path else ""

        def fill(module: nn.Module, inputs: Any) -> None:
            _require_values(path, inputs)
            for name, old in [*module._parameters.items(), *module._buffers.items()]:
                if old is not None and (old.is_meta or prefix + name in self._source) and not self._has(module, name):
                    value = self._source.read(prefix + name)
                    self._put(module, name, value.float() if value.is_floating_point() else value)

        return fill

    def _compact(self, path: str, embedding: nn.Module) -> Any:
        # At once, not when it runs: a model may send its token ids to wherever the weight is (Llama 4 does).
        module: Any = embedding
        self._padded.append((module, module.padding_idx))
        module.padding_idx = None  # only gradients care, and the rows have other numbers now
        self._put(module, "weight", self._rows(f"{path}.weight").float())

        def renumber(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            _require_values(path, inputs)
            return (torch.searchsorted(self._tokens, inputs[0]), *inputs[1:])

        return renumber

    def _rows(self, name: str) -> torch.Tensor:
        some = self._source.read_rows
        rows: torch.Tensor = self._source.read(name)[self._tokens] if some is None else some(name, self._tokens)
        return rows

    def _has(self, module: nn.Module, name: str) -> bool:
        return any(owner is module and known == name for owner, known, _ in self._emptied)

    def _put(self, module: nn.Module, name: str, value: torch.Tensor) -> None:
        buffers = name in module._buffers
        holder: Any = module._buffers if buffers else module._parameters
        self._emptied.append((module, name, holder[name]))
        holder[name] = value if buffers else nn.Parameter(value, requires_grad=False)


def _require_values(path: str, inputs: tuple[Any, ...]) -> None:
    """ModelError if an input has none: PyTorch may go on with whatever is in memory."""
    if any(isinstance(x, torch.Tensor) and x.is_meta for x in inputs):
        raise ModelError("is given a tensor without values, moved to where a weight is that is not there", where=path)
