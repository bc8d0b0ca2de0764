"""The skeleton of an open checkpoint, tied as its tensors say.

transformers ties an output head to the embedding where the config asks for it, but for two cases: an alias that is
stored with values of its own stays a weight of its own, and where only the alias is stored, the others are tied to it
(`PreTrainedModel.tie_weights`, transformers 5). A skeleton knows the config alone, so the first is looked up here, and
the second is a matter of names (see mapping.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from bitfold.checkpoints import Source
from bitfold.models import skeleton
from bitfold.models.mapping import Target, map_names
from bitfold.qtensor import ALIGNED

_AT_ONCE = 1 << 24  # numbers compared at a time


def open_skeleton(source: Source, *, dtype: torch.dtype | None = None) -> nn.Module | None:
    """The skeleton for a checkpoint, tied as transformers would tie it; None when transformers does not have the class.

    Args:
        source: the open checkpoint.
        dtype: of the parameters; default: what the config says, else float32.

    Raises:
        ModelError: the config is refused, or the checkpoint lacks tensors of the model.
    """
    model = skeleton.of_config(source.config, str(source.path), dtype=dtype)
    if model is not None:
        for alias, main in untrue_ties(source, model).items():
            warnings.warn(
                f"{alias} is stored with other values than {main}: the two are not tied, whatever config.json says",
                stacklevel=3,
            )
            skeleton.untie(model, alias)
    return model


def untie_stored(model: nn.Module, names: Iterable[str]) -> None:
    """Untie, in the skeleton of a folder of ours, what it stores both of: what is tied is stored there once."""
    stored = set(names)
    for alias, main in skeleton.tied_names(model).items():
        if alias in stored and main in stored:
            skeleton.untie(model, alias)


def untrue_ties(source: Source, model: nn.Module) -> dict[str, str]:
    """Tied tensors that the checkpoint stores with other values than those they are tied to: alias -> main."""
    tied = skeleton.tied_names(model)
    if not tied:
        return {}
    targets = {name: target for target in map_names(source.names(), model) for name in target.names}
    both = {alias: main for alias, main in tied.items() if alias in targets and main in targets}
    return {alias: main for alias, main in both.items() if not _equal(source, model, targets, main, alias)}


def _equal(source: Source, model: nn.Module, targets: Mapping[str, Target], main: str, alias: str) -> bool:
    """Whether two tensors are the same in the dtype of the model, compared some rows at a time where they can be."""
    dtype, pair = model.state_dict()[alias].dtype, (main, alias)
    infos = [source.info(targets[name].sources[0]) for name in pair]
    some = source.read_rows
    if some is None or any(targets[n].converter is not None for n in pair) or not infos[0].shape:
        one, other = (targets[name].read(source.read, model)[name].to(dtype) for name in pair)
        return torch.equal(one, other)
    if infos[0].shape != infos[1].shape:
        return False
    rows = infos[0].shape[0]
    step = max(ALIGNED, _AT_ONCE * rows // max(1, infos[0].numel))
    for first in range(0, rows, step):
        piece = torch.arange(first, min(first + step, rows))
        one, other = (some(targets[name].sources[0], piece).to(dtype) for name in pair)
        if not torch.equal(one, other):
            return False
    return True
