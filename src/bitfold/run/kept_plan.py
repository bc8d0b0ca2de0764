"""What a run that is to have a size finds out before its work, kept beside the output until that is there.

`.NAME.plan-KEY` beside NAME: the sums of the measurement after each window, for whatever size; then the recipe and what
is said of it. The same command goes on with the windows that are left, and with the same plan: its work is known by its
rules.
"""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from bitfold.checkpoints import Source
from bitfold.checkpoints.shards import written_error
from bitfold.errors import BitfoldError
from bitfold.recipes.recipe import Recipe
from bitfold.run.options import Request, RunOptions
from bitfold.text.windows import text_digest
from bitfold.version import __version__

_SUMS = "sums.safetensors"


class KeptPlan:
    """Of one run.

    Args:
        request, options: of the run.
        source: open.
        calibrated: whether its rules are to be; what is measured is the same.
    """

    def __init__(self, request: Request, options: RunOptions, source: Source, *, calibrated: bool) -> None:
        self._dry = options.dry_run
        text = {**asdict(request.text), "text": text_digest(request.text.text)}
        measured = _key([__version__, source.fingerprint(), text, options.seed])
        given = request.imatrix  # what is not there is told of when it is read
        costs = given and given.is_file() and hashlib.sha256(given.read_bytes()).hexdigest()
        asked = [request.kind, request.target_bytes, request.target_bpw, repr(request.wanted), costs]
        self._name = f"recipe-{_key([*asked, options.max_shard_bytes, calibrated])}"
        self._folder = request.out.with_name(f".{request.out.name}.plan-{measured}")
        if options.restart:
            forget_plans(request.out)

    def load(self) -> dict[str, torch.Tensor] | None:
        """Sums that were kept last; None: none, or they are damaged."""
        try:
            return load_file(self._folder / _SUMS)
        except (OSError, SafetensorError):
            return None

    def keep(self, state: dict[str, torch.Tensor]) -> None:
        """Sums after a window."""
        if not self._dry:
            self._write(_SUMS, save({name: x.contiguous() for name, x in state.items()}))

    def plan(self) -> tuple[Recipe, list[str]] | None:
        """The recipe that was decided on, and what was said of it; None: none was."""
        try:
            lines = json.loads((self._folder / f"{self._name}.json").read_text(encoding="utf-8"))
            return Recipe.load(self._folder / f"{self._name}.toml"), [str(line) for line in lines]
        except (OSError, ValueError, BitfoldError):
            return None

    def keep_plan(self, rules: Recipe, lines: list[str]) -> None:
        """Keep them."""
        if not self._dry:
            self._write(f"{self._name}.toml", rules.dumps().encode())
            self._write(f"{self._name}.json", json.dumps(lines).encode())

    def _write(self, name: str, data: bytes) -> None:
        """Under its name only when it is whole."""
        partial = self._folder / f"{name}.partial"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            partial.replace(self._folder / name)
        except OSError as error:
            raise written_error(error, self._folder / name, "cannot be written") from error


def _key(facts: list[object]) -> str:
    words = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(words.encode()).hexdigest()[:12]


def forget_plans(out: Path) -> None:
    """What was kept beside an output that is there, or is to be begun anew."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.plan-*"):
        shutil.rmtree(folder, ignore_errors=True)
