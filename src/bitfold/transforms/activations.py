"""How activations are treated at run time, by name.

    float          as they come
    int8           rounded to 8 bits for each token, as the data comes
    int8-mixed:T   LLM.int8(): columns of a batch in which some |x| >= T stay in floating point and meet the dequantized
                   columns of the weight; the rest is int8 (Dettmers et al. 2022, arXiv 2208.07339; T = 6.0)
    int8-static    rounded to 8 bits with one scale for the layer, found by calibration and stored with the
                   weight; larger activations saturate (SmoothQuant's static setting)
    auto           recipes only: int8 where calibration measures that the KL grows by no more than a twentieth,
                   else float

The name is what recipes and checkpoints store.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bitfold.errors import UsageError
from bitfold.system.tensorinfo import TensorInfo

THRESHOLD = 6.0
ACT_SCALE = "act_scale"
MEASURED = "auto"
KNOWN = "float, int8, int8-static, int8-mixed:6.0 or auto"


@dataclass(frozen=True)
class Act:
    """A treatment of activations.

    Args:
        kernel: what kernels are asked for, "float" or "int8".
        threshold: magnitude from which on a column stays in floating point; None = no column does.
        static: activations are rounded with a stored scale before the kernel sees them.
        measured: recipes only, calibration decides between "int8" and "float"; until then they are floats.
    """

    kernel: str
    threshold: float | None = None
    static: bool = False
    measured: bool = False

    @property
    def name(self) -> str:
        """The name that recipes and checkpoints store."""
        if self.measured:
            return MEASURED
        if self.static:
            return "int8-static"
        return self.kernel if self.threshold is None else f"int8-mixed:{self.threshold}"

    def layout(self) -> dict[str, TensorInfo]:
        """Tensors stored beside the weight."""
        return {ACT_SCALE: TensorInfo(torch.float32, (1,))} if self.static else {}


def read_act(text: str) -> Act:
    """The treatment of that name.

    Raises:
        UsageError: unknown, or a threshold that is negative or no number.
    """
    kind, _, number = text.partition(":")
    if text in ("float", "int8"):
        return Act(text)
    if text == MEASURED:
        return Act("float", measured=True)
    if text == "int8-static":
        return Act("float", static=True)
    if kind != "int8-mixed":
        raise UsageError(f"unknown activation type {text!r}", hint=KNOWN)
    try:
        threshold = float(number) if number or text.endswith(":") else THRESHOLD
    except ValueError:
        threshold = -1.0
    if not threshold >= 0:
        raise UsageError(f"{number!r} is no threshold for outliers", hint="a magnitude, as in int8-mixed:6.0")
    return Act("int8", threshold)


def round_static(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Activations rounded to codes -127..127 times `scale` (1,); a scale of 0 (never calibrated) leaves them alone."""
    step = scale.to(x.dtype)
    rounded = (x / torch.where(step > 0, step, 1.0)).round().clamp(-127, 127) * step
    return torch.where(step > 0, rounded, x)
