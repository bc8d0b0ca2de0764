"""Folders for other engines (implement `Target`): the inverse of their readers. What all these kinds have in common.

Codes of ours go over as they are: the same codes, scales and zero points in another order. What an engine has no words
for is refused when places are given, before any work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfold.checkpoints.base import Source
from bitfold.checkpoints.folder import SafetensorsFolder
from bitfold.checkpoints.schema import Content, Entry
from bitfold.errors import CheckpointError
from bitfold.formats import AnyFormat, get_format
from bitfold.formats.grids import E4M3, Grid, ints, uints
from bitfold.system.tensorinfo import TensorInfo

I32 = torch.int32
HEAD = "lm_head"
Named = dict[str, Tensor]
INT, FP8, MXFP4, NVFP4 = "int", "fp8", "mxfp4", "nvfp4"
_ACTS = ("float", "int8", "int8-static")
_HINT = "bitfold quantize --export chooses a format that it holds; or --format int4-g128 (int4-asym-g128)"


@dataclass(frozen=True)
class Held:
    """Codes with scales, as these engines have them.

    Args:
        kind: "int", "fp8" (E4M3), "mxfp4", "nvfp4".
        bits: of a code.
        group: inputs that share a scale; 0: a whole row; -1: the whole tensor.
        zeros: with zero points; else they are symmetric.
        act: activations: "float", "int8" (token by token) or "int8-static".
    """

    kind: str
    bits: int
    group: int
    zeros: bool = False
    act: str = "float"


def held_of(name: str, entry: Entry) -> Held:
    """What a packed weight is, for engines; CheckpointError where it is something that none of them knows."""
    form = entry.format
    if entry.transform is not None:
        what = "is stored in another basis (rotated or scaled), which engines cannot undo"
        raise CheckpointError(what, where=name, hint=_HINT)
    if len(entry.shape) != 2 or entry.transposed or is_embedding(name):
        what = "is no linear layer: embeddings and stacks of experts stay plain"
        raise CheckpointError(what, where=name, hint=_HINT)
    if entry.act not in _ACTS:
        raise CheckpointError(f"has activations {entry.act}", where=name, hint=f"one of {', '.join(_ACTS)}")
    for known, group in ((MXFP4, 32), (NVFP4, 16)):
        if form == get_format(known):
            return Held(known, 4, group, act=entry.act)
    return _scaled(name, form, entry)


def _scaled(name: str, form: AnyFormat, entry: Entry) -> Held:
    """Integers or FP8 with scales of their own."""
    scale, wrong = form.scale, f"is {form.name}, which is no format of integers or FP8 with scales"
    if form.grid is None or scale is None or scale.of is not None or isinstance(scale.store, Grid):
        raise CheckpointError(wrong, where=name, hint=_HINT)
    whole = scale.block == (0, 0)
    group = -1 if whole else 0 if scale.block[1] >= entry.shape[1] else scale.block[1]
    if form.grid == E4M3 and scale.offset is None and group <= 0 and (whole or scale.block[0] == 1):
        return Held(FP8, 8, group, act=entry.act)
    bits, zeros = form.grid.code_bits, scale.offset is not None
    if (
        form.grid != (uints(bits) if zeros else ints(bits))
        or scale.block[0] != 1
        or scale.offset not in (None, form.grid)
    ):
        raise CheckpointError(f"{wrong} of rows", where=name, hint=_HINT)
    return Held(INT, bits, group, zeros, entry.act)


def is_embedding(name: str) -> bool:
    """Whether a tensor is called like one."""
    last = name.removesuffix(".weight").rpartition(".")[2]
    return "embed" in last or last in ("wte", "wpe")


def words(packed: Tensor) -> Tensor:
    """int32 (n, words) of rows of bytes, filled with zeros."""
    return torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 4)).contiguous().view(I32)


def module_of(name: str) -> str:
    """The module that a weight belongs to."""
    return name.removesuffix(".weight")


def _part(name: str, part: str) -> str:
    return f"{module_of(name)}.{part}"


class PackedFolder(SafetensorsFolder):
    """See `Target`; what an engine's folders have in common.

    A kind says which weights it can hold (`check`), what it calls their parts (`layout_of`, `parts_of`) and what stands
    in config.json (`settings`).
    """

    program = ""

    def __init__(
        self, folder: Path, max_shard_bytes: int | None, source: Source | None = None, variant: str = ""
    ) -> None:
        super().__init__(folder, max_shard_bytes, source, variant)
        self._entries: dict[str, Entry] = {}
        self._linear: list[str] = []  # modules that stay plain

    def stored(self, contents: Mapping[str, Content]) -> dict[str, TensorInfo]:
        """See `Target`.

        Raises:
            CheckpointError: a weight that the engine has no words for, or nothing packed at all.
        """
        entries = {name: content for name, content in contents.items() if isinstance(content, Entry)}
        if not entries:
            hint = "bitfold quantize first, with a format of integers"
            raise CheckpointError(f"nothing in it is packed, as {self.program} wants it", hint=hint)
        held = {name: held_of(name, entry) for name, entry in entries.items()}
        for name, what in held.items():
            self.check(name, what, entries[name])
        self.check_together(held)
        found: dict[str, TensorInfo] = {}
        for name, content in contents.items():
            if isinstance(content, Entry):
                found |= {
                    _part(name, part): info for part, info in self.layout_of(content, held_of(name, content)).items()
                }
            else:
                found[name] = content
        self._entries = entries
        self._linear = [
            module_of(n)
            for n, c in contents.items()
            if n not in entries and n.endswith(".weight") and len(c.shape) == 2
        ]
        return found

    def layout(self, contents: Mapping[str, Content]) -> None:
        """See `Target`."""
        super().layout(contents)
        self._packed = {name: set(entry.layout()) for name, entry in self._entries.items()}

    def pack(self, name: str, fields: Mapping[str, Tensor]) -> dict[str, str]:
        """See `Target`."""
        entry = self._entries[name]
        if fields.keys() != entry.layout().keys():
            what = f"is packed as {sorted(fields)}, {sorted(entry.layout())} were planned"
            raise CheckpointError(what, where=f"{self.folder}: {name}")
        parts = self.parts_of(name, entry, fields)
        return {_part(name, part): self._open.write(_part(name, part), [w]) for part, w in parts.items()}

    def finish(self, config: Mapping[str, Any], quantization: Mapping[str, Any] | None = None) -> None:
        """See `Target`; in place of bitfold's own words those of the engine."""
        super().finish(config, self.settings())

    def check(self, name: str, what: Held, entry: Entry) -> None:
        """CheckpointError for a weight that the engine cannot hold, whatever the others are."""
        raise NotImplementedError

    def check_together(self, found: Mapping[str, Held]) -> None:
        """CheckpointError for weights that the engine cannot hold in one folder."""

    def engines(self) -> dict[str, str]:
        """Who loads the folder, once `stored` was called: "yes" or "no", and why."""
        raise NotImplementedError

    def layout_of(self, entry: Entry, what: Held) -> dict[str, TensorInfo]:
        """dtype and shape of each part of a weight."""
        raise NotImplementedError

    def parts_of(self, name: str, entry: Entry, fields: Mapping[str, Tensor]) -> Named:
        """The parts of a weight."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """The quantization_config of config.json."""
        raise NotImplementedError

    def kinds(self) -> dict[str, Held]:
        """What each packed weight is."""
        return {name: held_of(name, entry) for name, entry in self._entries.items()}

    def plain_modules(self) -> list[str]:
        """Linear modules that stay plain, as far as names and shapes tell; the head is one even where it is tied."""
        packed = {module_of(name) for name in self._entries}
        found = [module for module in self._linear if not is_embedding(f"{module}.weight")]
        return found if HEAD in packed else list(dict.fromkeys([*found, HEAD]))
