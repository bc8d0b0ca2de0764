"""Quantize part of the blocks, train what is still in floating point, go on with the next part.

Scales and norms can take back a part of what rounding loses; the weights of blocks that are not rounded yet can take
back more, since they are free. So the blocks are quantized in parts, and between two of them the rest of the model
learns the original's predictions again, on the text that it is calibrated on. The order of QuIP#'s fine-tuning
(Tseng et al. 2024, arXiv 2402.04396, section 5: layers that are not quantized yet are trained before their turn), here
with the whole rest of the model and the divergence at its end as loss.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitfold.errors import UsageError
from bitfold.recipes.options import MethodOptions
from bitfold.recipes.recipe import Recipe, Rule
from bitfold.run.driver import run
from bitfold.run.options import Request, RunOptions
from bitfold.run.steps import open_model, plan
from bitfold.system import progress
from bitfold.training.distill import distill
from bitfold.training.options import Distillation
from bitfold.training.student import blocks_of

BETWEEN = 0.5  # of the time to learn; smaller last parts and two thirds of the time won nothing (docs/log.md)
_WINDOWS = 64  # of the text that a stage learns from; the next stage reads those behind them


@dataclass(frozen=True)
class Staged:
    """The stages before the last one.

    Args:
        original: the folder that is quantized.
        between: by whose name the folders of the stages are called; they lie beside it, hidden.
        text: what is learned from.
        minutes: of learning between the parts, all together.
    """

    original: Path
    between: Path
    text: str
    minutes: float

    def up_to_the_last(self, request: Request, options: RunOptions, stages: int) -> Request:
        """Do all but the last stage, which is returned: its source has all but the last part of the blocks packed, and
        the rest trained behind them.

        Raises:
            UsageError: fewer blocks than stages.
        """
        rules, blocks = _rules_and_blocks(request, options)
        if not 1 <= stages <= len(blocks):
            what = f"{stages} stages, and the model has {len(blocks)} blocks"
            raise UsageError(what, where="--stages", hint=f"1 to {len(blocks)}")
        current = self.original
        for stage in range(stages - 1):
            trained = self._folder("trained", stage)
            if not (trained / "config.json").is_file():
                part = blocks[len(blocks) * stage // stages : len(blocks) * (stage + 1) // stages]
                progress.say(f"stage {stage + 1} of {stages}: {part[0]} to {part[-1]}")
                self._stage(stage, replace(request, source=str(current)), options, only(rules, part), stages)
            current = trained
        if request.budget_flag is None:
            return replace(request, source=str(current))
        wanted = MethodOptions(recipe=rules)  # formats for a size are those of the original
        return replace(request, source=str(current), wanted=wanted, target_bytes=None, target_bpw=None, imatrix=None)

    def _stage(self, stage: int, request: Request, options: RunOptions, rules: Recipe, stages: int) -> None:
        packed, trained = self._folder("packed", stage), self._folder("trained", stage)
        if not (packed / "config.json").is_file():
            wanted = MethodOptions(recipe=rules)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "the rule .* matches no tensor")  # it is for another part
                part = replace(request, wanted=wanted, out=packed, target_bytes=None, target_bpw=None, imatrix=None)
                run(part, options)
        minutes = self.minutes / (stages - 1)
        how = Distillation(self.text, minutes, seed=options.seed, weights=True, first=stage * _WINDOWS, looks=1)
        again: dict[str, Any] = {"restart": options.restart, "lessons": self.lessons}
        found = distill(packed, self.original, trained, how, max_memory=options.max_memory, **again)
        change = f"held-out KL {found.kl_before:.4f} -> {found.kl_after:.4f}"
        progress.say(f"stage {stage + 1} of {stages}: {change} in {found.steps} steps")
        shutil.rmtree(packed, ignore_errors=True)
        if stage > 0:
            shutil.rmtree(self._folder("trained", stage - 1), ignore_errors=True)

    def _folder(self, what: str, stage: int) -> Path:
        return self.between.with_name(f"{self.between.name}-{what}-{stage + 1}")

    @property
    def text_file(self) -> Path:
        """Of the text that all stages are calibrated on, and of what its tokens weigh in the original: found once."""
        return self.between.with_name(f"{self.between.name}-text.safetensors")

    @property
    def lessons(self) -> Path:
        """The folder of what the original predicts, which all stages learn from."""
        return self.between.with_name(f"{self.between.name}-lessons")

    def clean(self) -> None:
        """Remove what the stages left, but for the lessons: more may be learned from them."""
        self.text_file.unlink(missing_ok=True)
        for folder in self.between.parent.glob(f"{self.between.name}-trained-*"):
            shutil.rmtree(folder, ignore_errors=True)


def _rules_and_blocks(request: Request, options: RunOptions) -> tuple[Recipe, list[str]]:
    """What a run would do, where that is left open, and the paths of the model's blocks."""
    with open_model(request, options) as opened:
        return plan(opened, request, options).job.rules, blocks_of(opened.model)


def only(rules: Recipe, blocks: Sequence[str]) -> Recipe:
    """The rules, for what is in these blocks; all else is kept."""
    inside = "|".join(re.escape(f"{block}.") for block in blocks)
    return Recipe((Rule(f"re:(?!{inside}).*"), *rules.rules))
