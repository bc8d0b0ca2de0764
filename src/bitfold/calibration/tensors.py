"""The tensors of a model by name, whatever tensors of the source they are made from."""

from __future__ import annotations

import torch
from torch import nn

from bitfold.checkpoints import Source
from bitfold.errors import WeightError
from bitfold.models import skeleton
from bitfold.models.opening import open_skeleton
from bitfold.nn import set_tensor
from bitfold.planning.plan import Plan


class DamagedError(WeightError):
    """A tensor of the checkpoint is not finite: nothing that could be done instead would be right."""


class Reader:
    """Reads them.

    Args:
        source: the open checkpoint.
        model: the skeleton on the meta device.
        plan: of the run.
    """

    def __init__(self, source: Source, model: nn.Module, plan: Plan) -> None:
        self._source, self._model = source, model
        self._items = {name: item.target for item in plan.items for name in item.target.names}
        self._tied = skeleton.tied_names(model)
        # What the family computes by itself and never saves; the model goes back to the meta device in between.
        self._computed = {name: p.detach().clone() for name, p in model.named_parameters() if not p.is_meta}

    def read(self, name: str) -> torch.Tensor:
        """One tensor; DamagedError when it is not finite."""
        name = self._stored(name)
        if name not in self._items and name in self._computed:
            return self._computed[name]
        tensor = self._items[name].read(self._source.read, self._model)[name]
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DamagedError("NaN or infinity among the weights", where=name, hint="the checkpoint is damaged")
        return tensor

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Some rows of a tensor, without the others where the source can do that."""
        target = self._items[self._stored(name)]
        some = self._source.read_rows
        if target.converter is not None or some is None:
            return self.read(name)[rows]
        part: torch.Tensor = some(target.sources[0], rows)
        return part

    def _stored(self, name: str) -> str:
        """A name that is tied is read under the one that is stored."""
        return name if name in self._items else self._tied.get(name, name)

    def __contains__(self, name: object) -> bool:
        return name in self._items or self._tied.get(str(name)) in self._items


def original(source: Source, reader: Reader, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The original model, whole."""
    model = open_skeleton(source, dtype=dtype)
    assert model is not None
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            set_tensor(model, name, reader.read(name).to(dtype))
    for name, _ in list(model.named_buffers()):
        if name in reader:
            set_tensor(model, name, reader.read(name))
    skeleton.retie(model)
    return model
