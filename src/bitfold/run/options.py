"""What a run is asked for, as values: what to make of which checkpoint, and how to go about it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bitfold.calibration.options import Calibration, settings
from bitfold.checkpoints.targets import FOLDER
from bitfold.errors import UsageError
from bitfold.executors.opening import LOCAL
from bitfold.recipes.options import MethodOptions
from bitfold.recipes.recipe import Recipe
from bitfold.records.run_report import TensorReport
from bitfold.system.backend import CPU
from bitfold.system.outputs import real_path
from bitfold.text.tokens import BUNDLED

__all__ = ["MethodOptions", "OnTensor", "Request", "RunOptions"]

OnTensor = Callable[[TensorReport], None]


@dataclass(frozen=True)
class Request:
    """What is to be made.

    Args:
        source: a local Hugging Face folder, a GGUF file, or a Hub id.
        out: the folder to make; its real path is kept, whatever `.`, `~` and links it is written with.
        wanted: how weights are to be quantized.
        calibration: text and options for methods that are calibrated, or just the text; None = where it is needed, the
            text that comes with bitfold and what the method is used to.
        export: what is made: None: a bitfold folder; "gptq" and others of ENGINES: a folder for other engines;
            "gguf:Q4_K_M" and the like: a GGUF file of that mixture, `out`; "gguf:auto": one of `target_bytes`, types
            chosen for it.
        target_bytes, target_bpw: size of the whole file, or of all files of weights, in bytes or in bits for each
            weight; formats are chosen for it.
        imatrix: what errors cost, from `bitfold imatrix`, to choose by; None = it is measured.
    """

    source: str
    out: Path
    wanted: MethodOptions
    calibration: Calibration | str | None = None
    export: str | None = None
    target_bytes: int | None = None
    imatrix: Path | None = None
    target_bpw: float | None = None

    @property
    def budget_flag(self) -> str | None:
        """By which option a size is asked for; None = none is."""
        if self.target_bpw is not None:
            return "--target-bpw"
        return None if self.target_bytes is None else "--target-size"

    def limit(self, numel: int) -> int:
        """Bytes of the size that is asked for, of a model of so many weights."""
        assert self.target_bytes is not None or self.target_bpw is not None
        return self.target_bytes if self.target_bytes is not None else int((self.target_bpw or 0) * numel / 8)

    @property
    def text(self) -> Calibration:
        """The calibration, where the method is left open."""
        return (
            self.calibration if isinstance(self.calibration, Calibration) else Calibration(self.calibration or BUNDLED)
        )

    @property
    def kind(self) -> str:
        """What is made, as TARGETS have it."""
        return self.export or FOLDER

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", real_path(self.out))
        if self.target_bpw is not None and not 0 < self.target_bpw < math.inf:
            what = f"{self.target_bpw} bits for each weight make no sense"
            raise UsageError(what, where="--target-bpw", hint="write it like 2.7")
        if self.target_bytes is not None and self.target_bpw is not None:
            raise UsageError("a size is said twice", where="--target-bpw", hint="drop it, or --target-size")

    def calibration_of(self, rules: Recipe) -> Calibration | None:
        """The calibration of a run by these rules; None where no rule needs one.

        Raises:
            UsageError: there is text that no rule uses.
        """
        given = self.calibration
        if not any(rule.needs_text for rule in rules.rules):
            if given is not None and (isinstance(given, str) or given.text != BUNDLED):
                raise UsageError("no rule uses the calibration text", hint="--method gptq does, and others")
            return None
        return given if isinstance(given, Calibration) else settings(self.wanted.method, given or BUNDLED)


@dataclass(frozen=True)
class RunOptions:
    """How a run goes about it. Of all these, only `seed`, `max_shard_bytes` and `pre_tokenizer` are seen in the result.

    Args:
        seed: for methods that draw random numbers.
        max_shard_bytes: size at which a new file is begun; None: SHARD_BYTES in folders, and one GGUF file.
        max_memory: ceiling on the resident memory of the whole process, bytes; None = none is named.
        dry_run: plan and report only; write nothing.
        restart: forget what an earlier run that was cut short has finished.
        strict: raise when a tensor is flagged.
        events: a file to which what happens is appended as JSON lines.
        revision, token: of the Hub repository.
        pre_tokenizer: of a GGUF file, by which rule its tokenizer cuts text, whatever the file says.
        upload_repo: push the finished folder there.
        low_disk: fetch and send file by file, keeping neither; from a repository to `upload_repo`.
        on_tensor: called with the report of each tensor as it is written.
        executor: where the work is done: "local", this process; "processes", others of this machine; "ray", Ray on this
            machine; "ray:ADDRESS", a Ray cluster.
        workers: how many of those; None: one for each core.
        device: what weights are rounded and solved on, and blocks run on. Sums are made in another order there, so the
            bytes of what is calibrated are seen to differ.
        kept_text: a file in which the token ids and the weights of tokens, those of every layer, go from one run to
            the next on the same text; the first one writes it.
    """

    seed: int = 0
    max_shard_bytes: int | None = None
    max_memory: int | None = None
    dry_run: bool = False
    restart: bool = False
    strict: bool = False
    events: Path | None = None
    revision: str | None = None
    token: str | None = None
    upload_repo: str | None = None
    on_tensor: OnTensor | None = None
    pre_tokenizer: str | None = None
    low_disk: bool = False
    executor: str = LOCAL
    workers: int | None = None
    device: torch.device = CPU
    kept_text: Path | None = None
