"""Calibration: text in, statistics of the inputs of every layer out, one block of the model in memory at a time."""

from __future__ import annotations

from bitfold.calibration.fisher import token_weights
from bitfold.calibration.shape import walk_shape
from bitfold.calibration.statistics import Statistics, TuningBlock, Wanted
from bitfold.calibration.walk import BlockWalk, Text
from bitfold.text.tokens import calibration_tokens

__all__ = [
    "BlockWalk",
    "Statistics",
    "Text",
    "TuningBlock",
    "Wanted",
    "calibration_tokens",
    "token_weights",
    "walk_shape",
]
