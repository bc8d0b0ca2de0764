"""From the names of a checkpoint to the names of the model.

Checkpoints on the Hub do not always use the names of today's model class: prefixes moved, and the experts of mixture
models are stored one by one but held as one stack. transformers knows those conversions; they are applied before
quantizing, so that a quantized folder has exactly the tensors that the model has, and loading it needs no conversion.
Without a known model class the names stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bitfold.errors import ModelError
from bitfold.models.skeleton import may_be_absent, tied_names

_WRAPPERS = {"module.": "DistributedDataParallel", "_orig_mod.": "torch.compile"}
_NUMBER = re.compile(r"\.(\d+)\.")
Read = Callable[[str], torch.Tensor]


@dataclass
class Target:
    """One or more tensors of the model, made from one or more tensors of the checkpoint.

    Args:
        names: tensors of the model.
        sources: tensors of the checkpoint, in the order in which they are combined.
        converter: transformers' recipe for combining them; None where the one source is the one target.
        used: False for tensors that the model class has no place for.
    """

    names: list[str]
    sources: list[str]
    converter: Any = None
    patterns: list[str] = field(default_factory=list)
    used: bool = True

    def read(self, read: Read, model: nn.Module | None) -> dict[str, torch.Tensor]:
        """The target tensors, computed from the checkpoint."""
        if self.converter is None:
            return {self.names[0]: read(self.sources[0])}
        work = deepcopy(self.converter)
        first = self.names[0]
        for source, pattern in zip(self.sources, self.patterns, strict=True):
            work.add_tensor(first, source, pattern, read(source))
        made = work.convert(first, model=model, config=getattr(model, "config", None))
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def map_names(names: Iterable[str], model: nn.Module | None) -> list[Target]:
    """Targets for all tensors of a checkpoint.

    Args:
        names: tensors of the checkpoint.
        model: skeleton on the meta device; None leaves all names as they are.

    Raises:
        ModelError: the model has tensors that the checkpoint does not, named.
    """
    if model is None or not hasattr(model, "base_model_prefix"):
        return [Target([name], [name]) for name in names]
    have = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    stored: dict[str, Any] = model.state_dict()
    renamings, converters = _conversions(model)
    targets: dict[str, Target] = {}
    for name in sorted(names, key=_natural):
        _add(targets, name, stored, renamings, converters, str(model.base_model_prefix))
    _stored_under_aliases(targets, model)
    _check_complete(targets, stored, model, have)
    return list(targets.values())


def _stored_under_aliases(targets: dict[str, Target], model: nn.Module) -> None:
    """Where an alias alone is stored, it is the tensor that the others are tied to: the first of them."""
    made = {name: target for target in targets.values() for name in target.names}
    for alias, main in tied_names(model).items():
        if main not in made and alias in made and made[alias].converter is None:
            made[main] = made.pop(alias)
            made[main].names[:] = [main]


def _add(
    targets: dict[str, Target],
    name: str,
    stored: dict[str, Any],
    renamings: list[Any],
    converters: list[Any],
    prefix: str,
) -> None:
    from transformers.core_model_loading import rename_source_key

    found, pattern = rename_source_key(name, renamings, converters, prefix, stored)
    if found not in stored and name in stored:
        found, pattern = name, None
    if pattern is None:
        targets[found] = Target([found], [name], used=found in stored)
        return
    target = targets.get(found)
    if target is None:
        converter = next(c for c in converters if pattern in c.source_patterns)
        target = targets[found] = Target(_all_targets(found, converter), [], converter)
    target.sources.append(name)
    target.patterns.append(pattern)


def _all_targets(first: str, converter: Any) -> list[str]:
    patterns = list(converter.target_patterns)
    return [first.replace(patterns[0], pattern) for pattern in patterns]


def _conversions(model: Any) -> tuple[list[Any], list[Any]]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError as error:
        raise ModelError("this transformers is too old", hint="pip install -U 'transformers>=5'") from error
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    return renamings, [m for m in mapping if isinstance(m, WeightConverter)]


def _check_complete(
    targets: Mapping[str, Target], stored: Mapping[str, Any], model: nn.Module, have: Mapping[str, Any]
) -> None:
    tied = tied_names(model)
    made = {name for target in targets.values() for name in target.names}
    made |= {main for alias, main in tied.items() if alias in made}
    expected = {*made, *tied}
    missing = [name for name in stored if name in have and name not in expected and not may_be_absent(model, name)]
    if missing:
        raise ModelError(
            f"the checkpoint lacks {len(missing)} tensors of {type(model).__name__}, the first is {missing[0]}",
            hint=_why_incomplete(missing, {name for name in made if name in stored}, targets.values()),
        )


def _why_incomplete(missing: list[str], made: set[str], targets: Iterable[Target]) -> str:
    """What most likely went wrong, and what to do."""
    strange = [name for target in targets if not target.used for name in target.sources]
    for wrapper, origin in _WRAPPERS.items():
        named = next((name for name in strange if f".{wrapper}" in f".{name}"), None)
        if named is not None and f".{named}".replace(f".{wrapper}", ".")[1:] in missing:
            return f"its tensors have {wrapper!r} in their names ({named}), as {origin} leaves it: save them without it"
    for name in missing:
        prefix = next((s.removesuffix(name) for s in strange if s.endswith(f".{name}")), None)
        if prefix is not None:
            return f"its tensors begin with {prefix!r}, which the model's do not: save them without it"
    layers = [{int(n) for name in some for n in _NUMBER.findall(name)[:1]} for some in (missing, made)]
    if all(layers) and min(layers[0]) > max(layers[1]) and all(_NUMBER.search(name) for name in missing):
        wanted, have = max(layers[0]) + 1, max(layers[1]) + 1
        return (
            f"config.json asks for {wanted} layers, the files have {have}: mend the number of layers, or fetch the rest"
        )
    return "`architectures` in config.json must name the class that was saved"


def _natural(name: str) -> list[tuple[int, str]]:
    """experts.2 before experts.10: stacks are filled in this order."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]
