"""ggml's vector types under error feedback: scales, then eight columns at a time, then the d that suits the codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitfold.formats.families.ggml_coder import refit_numbers
from bitfold.formats.families.ggml_layouts import unplanes
from bitfold.formats.families.ggml_points import points
from bitfold.formats.families.ggml_vector_search import GROUP, fit, nearest
from bitfold.formats.families.ggml_vectors import Codes, VectorType

_CHUNK = 1 << 20  # weights whose scales are searched at a time
_BLOCK = 256


class VectorCoder:
    """See `Coder`: eight columns at a time, their scales fixed beforehand.

    Args:
        type: of the numbers.
        w: (n, k), float32.
        importance: float32 (k,) of the inputs, or None.
    """

    step = GROUP
    at_once = 0
    feed = None

    def __init__(self, type: VectorType, w: Tensor, importance: Tensor | None) -> None:
        n, k = w.shape
        self._type, rows = type, max(1, _CHUNK // k)
        parts = [fit(type, w[at : at + rows], importance) for at in range(0, n, rows)]
        self._scale_codes, self._d = (torch.cat(some) for some in zip(*parts, strict=True))
        self._importance = torch.ones(k) if importance is None else importance
        per = GROUP // points(type.name).shape[1]
        self._points = torch.zeros(n, k // GROUP, per, dtype=torch.int16)
        self._signs = torch.zeros(n, k // GROUP, dtype=torch.uint8)
        self._values = torch.empty(n, k, dtype=torch.int8)

    def encode(self, w: Tensor, start: int) -> Tensor:
        """See `Coder`: inputs are taken for independent."""
        return self.under(w, start, torch.diag(self._importance[start : start + GROUP]))

    def under(self, w: Tensor, start: int, metric: Tensor) -> Tensor:
        """See `Coder`."""
        size = metric.diagonal().mean()
        if not size > 0:  # inputs that are always zero
            metric, size = torch.eye(GROUP), torch.ones(())
        metric = metric / size + 1e-6 * torch.eye(GROUP)
        scale = self._d[:, start // _BLOCK] * self._type.unit
        scale = (scale * (2 * self._scale_codes[:, start // self._type.sub].float() + 1))[:, None]
        found = nearest(self._type, (w * torch.where(scale > 0, 1 / scale, 0.0))[None], metric[None])
        at = start // GROUP
        self._points[:, at] = found.points[0].to(torch.int16)
        self._signs[:, at] = unplanes(found.negative[0], 1, 1)[:, 0]
        self._values[:, start : start + GROUP] = found.values[0].to(torch.int8)
        return found.values[0] * scale

    def fields(self) -> dict[str, Tensor]:
        """See `Coder`."""
        b = self._d.numel()
        of_points, signs, scale = (x.reshape(b, -1) for x in (self._points, self._signs, self._scale_codes))
        codes = Codes(of_points.long(), signs, scale, self._d.reshape(b, 1))
        return {"blocks": self._type.join(codes).view(len(self._d), -1)}

    def refit(self, w: Tensor, times: Callable[[Tensor, slice], Tensor]) -> None:
        """See `Coder`: the half-precision number of each block."""
        scale = self._type.unit * (2 * self._scale_codes.float() + 1)
        along = self._values * scale.repeat_interleave(self._type.sub, 1)
        refit_numbers(w, _BLOCK, [along], [self._d], times)


def encode(type: VectorType, w: Tensor, importance: Tensor | None) -> Tensor:
    """Bytes (n, k / 256 * block bytes) of w, float32 (n, k), without error feedback."""
    coder = VectorCoder(type, w, importance)
    for at in range(0, w.shape[1], GROUP):
        coder.encode(w[:, at : at + GROUP], at)
    return coder.fields()["blocks"]
