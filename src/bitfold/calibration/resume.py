"""How far a calibrated run is: after which block, with which activations, from which text.

While tokens are weighed, what was found is kept window by window.
After each block the activations that enter the next one are on disk, sealed by hashes, and a line in the journal says
so; then those of the block before are forgotten. A run that goes on begins with the block after the last such line.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file

from bitfold.calibration.spill import Stream
from bitfold.checkpoints.safetensors import digest_of
from bitfold.checkpoints.shards import save_tensors, sync_file
from bitfold.system.memory import peak
from bitfold.workspace.events import Events
from bitfold.workspace.folder import Workspace

_INPUTS, _TEXT, _WINDOW = "inputs.safetensors", "text.safetensors", "weights-{}.safetensors"
IDS, _STATE = "ids", "generator"


class Walk(Protocol):
    """What walks over blocks, of one list or of a whole model."""

    @property
    def name(self) -> str:
        """By which it is known among the walks of a run."""

    @property
    def streams(self) -> Mapping[str, Stream]:
        """Activations that enter the next block, by kind."""

    def __len__(self) -> int: ...
    def enter(self, streams: Mapping[str, Stream]) -> None:
        """Go on with these."""


class Bookmarks:
    """Of one run.

    Args:
        work: its workspace.
        done: tensors that are written, as far as their hashes agree.
        sync: called before a block is noted: brings what was written to the disk.
        events: who is told of finished blocks.
    """

    def __init__(self, work: Workspace, done: Collection[str], sync: Callable[[], None], events: Events) -> None:
        self._work, self._sync, self._events, self.done = work, sync, events, done
        for file in work.state.glob("*/scratch-*"):
            file.unlink()
        self.inputs_file, self.text_file = work.state / _INPUTS, work.state / _TEXT
        records = work.journal.of_kind("block")
        whole = all(name in done for record in records for name in record["tensors"])
        self._last = {record["walk"]: record for record in records} if whole else {}
        self._over = {record["walk"] for record in work.journal.of_kind("walk")} if whole else set[str]()

    def enter(self, walk: Walk) -> int:
        """Give the walk the activations of the next block to do; its number, 0 for a fresh start."""
        last = self._last.get(walk.name)
        if last is None:
            return 0
        following, facts, opened = int(last["index"]) + 1, last["streams"], dict[str, Stream | None]()
        for name in facts.keys() | walk.streams.keys():  # what entered the first block may have been less
            opened[name] = Stream.opened(self._file(walk, name, following), facts[name]) if name in facts else None
        streams = {name: stream for name, stream in opened.items() if stream is not None}
        if len(streams) < len(opened):
            return 0
        walk.enter(streams)
        return following

    def over(self, walk: Walk) -> bool:
        """Whether an earlier process came to the end of a walk, so that nothing of it is needed any more."""
        return walk.name in self._over

    def finish(self, walk: Walk) -> None:
        """A walk is at its end."""
        self._work.journal.append({"kind": "walk", "walk": walk.name})
        for name in walk.streams:
            for file in self.folder_of(walk.name).glob(f"{name}-*.bin"):  # it may end before its last block
                file.unlink(missing_ok=True)

    def _file(self, walk: Walk, stream: str, index: int) -> Path:
        return (self.folder_of(walk.name)) / f"{stream}-{index}.bin"

    def folder_of(self, walk: str) -> Path:
        """Where activations of a walk go, by its name."""
        folder = self._work.state / walk
        folder.mkdir(exist_ok=True)
        return folder

    def turn(self, index: int, tensors: list[str], walk: Walk) -> None:
        """A block is finished and its tensors are written."""
        self._sync()
        streams = {name: stream.seal() for name, stream in walk.streams.items()}
        self._work.journal.append(
            {"kind": "block", "walk": walk.name, "index": index, "tensors": tensors, "streams": streams}
        )
        self._work.journal.sync()
        self._events.write("block", index=index, tensors=tensors, peak_memory=peak())
        for name in {"original", *streams}:  # original-0 is both inputs of the first block
            self._file(walk, name, index).unlink(missing_ok=True)

    def inputs(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]] | None:
        """Token ids and weights that an earlier process worked out; None if there are none that can be trusted."""
        records = self._work.journal.of_kind("inputs")
        file = self._work.state / _INPUTS
        if not records or not file.is_file() or digest_of(file) != records[-1]["sha256"]:
            return None
        found = load_file(file)
        return found.pop(IDS), found

    def keep_inputs(self, ids: torch.Tensor, weights: dict[str, torch.Tensor]) -> None:
        """Keep them for the next process: the model's own text and gradients are dear."""
        file = self._work.state / _INPUTS
        self._save(file, {IDS: ids, **weights})
        self._work.journal.append({"kind": "inputs", "sha256": digest_of(file)})
        for old in (self._work.state / _TEXT, *self._work.state.glob(_WINDOW.format("*"))):
            old.unlink(missing_ok=True)

    def ids(self) -> torch.Tensor | None:
        """Token ids, where an earlier process had no time to weigh them."""
        found = self._load(_TEXT, "ids")
        return None if found is None else found[IDS]

    def keep_ids(self, ids: torch.Tensor) -> None:
        """Keep them."""
        file = self._work.state / _TEXT
        self._save(file, {IDS: ids})
        self._work.journal.append({"kind": "ids", "file": _TEXT, "sha256": digest_of(file)})

    def window(self, number: int) -> tuple[dict[str, torch.Tensor], torch.Tensor] | None:
        """Squares of gradients by layer (tokens,) in a window, and the state of the generator after it, if kept."""
        found = self._load(_WINDOW.format(number), "window")
        return None if found is None else (found, found.pop(_STATE))

    def keep_window(self, number: int, squares: dict[str, torch.Tensor], state: torch.Tensor) -> None:
        """Keep them."""
        file = self._work.state / _WINDOW.format(number)
        self._save(file, {**squares, _STATE: state})
        self._work.journal.append({"kind": "window", "file": file.name, "sha256": digest_of(file)})

    def _load(self, name: str, kind: str) -> dict[str, torch.Tensor] | None:
        """The tensors of a file of which the journal has the hash; None where it is not what the journal says."""
        file = self._work.state / name
        known = {record["file"]: record["sha256"] for record in self._work.journal.of_kind(kind)}
        return load_file(file) if file.is_file() and digest_of(file) == known.get(name) else None

    def _save(self, file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        save_tensors(tensors, file)
        sync_file(file)
