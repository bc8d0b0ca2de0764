"""How far a calibrated run is: after which block, with which activations, from which text.

After each block the activations that enter the next one are on disk, sealed by hashes, and a line in the journal says
so; then those of the block before are forgotten. A run that goes on begins with the block after the last such line.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bitfold.calibration import BlockWalk
from bitfold.calibration.spill import Spill, Stream
from bitfold.checkpoints.safetensors import digest_of
from bitfold.checkpoints.shards import sync_file, written_error
from bitfold.system.memory import peak
from bitfold.workspace.events import Events
from bitfold.workspace.folder import Workspace

_INPUTS, _IDS = "inputs.safetensors", "ids"


class Bookmarks:
    """Of one run.

    Args:
        work: its workspace.
        done: tensors that are written, as far as their hashes agree.
        sync: called before a block is noted: brings what was written to the disk.
        events: who is told of finished blocks.
    """

    def __init__(self, work: Workspace, done: Collection[str], sync: Callable[[], None], events: Events) -> None:
        self._work, self._sync, self._events = work, sync, events
        self.spill = Spill(work.state)
        for file in work.state.glob("scratch-*"):
            file.unlink()
        records = work.journal.of_kind("block")
        whole = all(name in done for record in records for name in record["tensors"])
        self._last = records[-1] if records and whole else None

    @property
    def folder(self) -> Path:
        """Where activations go."""
        return self._work.state

    def enter(self, walk: BlockWalk) -> int:
        """Give the walk the activations of the next block to do; its number, 0 for a fresh start."""
        if self._last is None:
            return 0
        following = int(self._last["index"]) + 1
        facts = self._last["streams"]
        opened = {name: Stream.opened(self.folder / f"{name}-{following}.bin", facts[name]) for name in walk.streams}
        streams = {name: stream for name, stream in opened.items() if stream is not None}
        if len(streams) < len(opened):
            return 0
        walk.enter(streams)
        return following

    def turn(self, index: int, tensors: list[str], walk: BlockWalk) -> None:
        """A block is finished and its tensors are written."""
        self._sync()
        streams = {name: stream.seal() for name, stream in walk.streams.items()}
        self._work.journal.append({"kind": "block", "index": index, "tensors": tensors, "streams": streams})
        self._work.journal.sync()
        self._events.write("block", index=index, tensors=tensors, peak_memory=peak())
        for name in {"original", *streams}:  # original-0 is both inputs of the first block
            (self.folder / f"{name}-{index}.bin").unlink(missing_ok=True)

    def inputs(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]] | None:
        """Token ids and weights that an earlier process worked out; None if there are none that can be trusted."""
        records = self._work.journal.of_kind("inputs")
        file = self.folder / _INPUTS
        if not records or not file.is_file() or digest_of(file) != records[-1]["sha256"]:
            return None
        found = load_file(file)
        return found.pop(_IDS), found

    def keep_inputs(self, ids: torch.Tensor, weights: dict[str, torch.Tensor]) -> None:
        """Keep them for the next process: the model's own text and gradients are dear."""
        file = self.folder / _INPUTS
        try:
            save_file({_IDS: ids.contiguous(), **{name: w.contiguous() for name, w in weights.items()}}, file)
        except (OSError, RuntimeError) as error:
            cause: Any = error if isinstance(error, OSError) else OSError(str(error))
            raise written_error(cause, file, "cannot be written") from error
        sync_file(file)
        self._work.journal.append({"kind": "inputs", "sha256": digest_of(file)})
