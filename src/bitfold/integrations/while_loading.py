"""Weights that are quantized while transformers loads a checkpoint: each as it comes, or calibrated beforehand."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from bitfold.checkpoints.bitfold_folder import quantization_config
from bitfold.checkpoints.hub.fetch import resolve
from bitfold.checkpoints.safetensors import SafetensorsSource
from bitfold.checkpoints.schema import Entry, read_entries, stored_name
from bitfold.errors import CheckpointError, UsageError
from bitfold.models.swap import quantize_site_tensor
from bitfold.planning.auto import choose
from bitfold.planning.plan import plan_sites
from bitfold.recipes.options import MethodOptions, choose_recipe
from bitfold.run.driver import quantize
from bitfold.system import progress

Fields = Mapping[str, torch.Tensor]


class Packing(Protocol):
    """What becomes of the tensors of a checkpoint, by their names in the model."""

    names: frozenset[str]

    def pack(self, name: str, w: torch.Tensor) -> tuple[Entry | None, Fields]:
        """How a tensor of `names` is stored and its fields on the CPU; None and one field "": a plain tensor."""
        ...


class AsItComes:
    """Data-free methods, on one tensor at a time.

    Args:
        model: the skeleton that transformers built.
        wanted: how weights are to be quantized; bits alone: as `bitfold quantize` chooses without calibration.
        seed: for methods that draw random numbers.

    Raises:
        UsageError: a method that needs calibration.
        FormatError: a format that cannot hold a tensor.
    """

    def __init__(self, model: nn.Module, wanted: MethodOptions, seed: int) -> None:
        if wanted.leaves_the_choice:
            choice = choose(wanted.bits, lambda: "no calibration text is named", tokens=0)
            progress.say(f"{choice.method}: {choice.why}")
            wanted = wanted.with_choice(choice.options)
        recipe = choose_recipe(wanted)
        if any(rule.needs_text for rule in recipe.rules):
            hint = 'BitfoldConfig(..., calibration="default"), or a file of text; or method="rtn"'
            raise UsageError("the method needs calibration text", where="BitfoldConfig", hint=hint)
        planned = plan_sites(model, recipe, shorten_groups=wanted.shortens_groups)
        self._decisions = {d.tensor: d for d in planned if not d.scheme.format.plain}
        self._seed = seed
        self.names = frozenset(self._decisions)

    def pack(self, name: str, w: torch.Tensor) -> tuple[Entry | None, Fields]:
        """See `Packing`."""
        decision = self._decisions[name]
        entry = decision.entry(self._seed)
        assert entry is not None, name
        q = quantize_site_tensor(w.detach().cpu(), decision.site, decision.scheme, self._seed)
        return entry, {**q.fields, **({} if entry.transform is None else entry.transform.fields())}


class Calibrated:
    """Any method: the checkpoint is quantized into a folder of its own first, in the memory of `bitfold.quantize`.

    Args:
        source: the folder or the repository.
        revision: of the repository.
        options: of `bitfold.quantize`.

    Raises:
        BitfoldError: see `bitfold.quantize`.
    """

    def __init__(self, source: str, revision: str | None, options: Mapping[str, Any]) -> None:
        self._place = tempfile.TemporaryDirectory(prefix="bitfold-")
        folder = Path(self._place.name) / "quantized"
        local = Path(source) if Path(source).is_dir() else resolve(source, revision=revision)
        quantize(local, folder, **{**options, "keep_embeddings": True})  # tied to a head that transformers has made
        said = quantization_config(folder)
        if said is None:
            raise CheckpointError("was not written as it should be", where=str(folder))
        self._entries, self._source = read_entries(said), SafetensorsSource(folder)
        fields = {field for name, entry in self._entries.items() for field in entry.stored(name)}
        self.names = frozenset({*self._entries, *self._source.names()} - fields)

    def pack(self, name: str, w: torch.Tensor) -> tuple[Entry | None, Fields]:
        """See `Packing`."""
        entry = self._entries.get(name)
        if entry is None:  # kept, and perhaps with factors folded into it
            return None, {"": self._source.read(name)}
        return entry, {field: self._source.read(stored_name(name, field)) for field in entry.layout()}
