"""What a run reports: every tensor, its bytes before and after, its error; totals."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import torch

from bitfold.qtensor import QTensor
from bitfold.system.memory import peak as peak_memory
from bitfold.system.parallel import parallel_map
from bitfold.system.units import size_text

PACKED_ALREADY = "packed already"  # the reason of what goes from the source into the output as it is


@dataclass(frozen=True)
class TensorReport:
    """One tensor.

    Args:
        tensor: its name.
        shape: as the model has it.
        format: the format it was stored in; None = kept as it was.
        reason: the rule, or why it was kept.
        bytes_before, bytes_after: stored size.
        error: relative square error of the weights, |w - wq|^2 / |w|^2; None for kept tensors and plans.
        output_error: the same of the layer's output under the calibration inputs; None without calibration.
        flags: what looks wrong, in words.
    """

    tensor: str
    shape: tuple[int, ...]
    format: str | None
    reason: str
    bytes_before: int
    bytes_after: int
    error: float | None = None
    output_error: float | None = None
    flags: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, text: dict[str, Any]) -> TensorReport:
        """As `asdict` and JSON left it."""
        return cls(**{**text, "shape": tuple(text["shape"]), "flags": tuple(text["flags"])})

    @classmethod
    def from_known(cls, text: dict[str, Any]) -> TensorReport:
        """As `to_dict` and JSON left it."""
        return cls.from_dict({key: value for key, value in text.items() if key != "bpw"})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with stable keys."""
        return {**asdict(self), "shape": list(self.shape), "flags": list(self.flags), "bpw": self.bpw}

    @property
    def numel(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def bpw(self) -> float:
        """Stored bits per weight."""
        return 8 * self.bytes_after / max(1, self.numel)


@dataclass
class QuantizeReport:
    """A whole run. Sizes count tensors, not the few kilobytes of headers and side files."""

    source: str
    output: str | None
    recipe: list[dict[str, Any]]
    tensors: list[TensorReport] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory: int | None = None
    url: str | None = None
    account: dict[str, Any] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    ceiling: int | None = None
    preflight: dict[str, Any] = field(default_factory=dict)
    method: str = ""
    acts: dict[str, Any] | None = None
    fallbacks: list[dict[str, Any]] = field(default_factory=list)

    def add(self, tensor: TensorReport) -> None:
        """Append a tensor that was written."""
        self.tensors.append(tensor)

    @property
    def quantized(self) -> list[TensorReport]:
        """Tensors that were quantized."""
        return [t for t in self.tensors if t.format is not None]

    @property
    def kept(self) -> list[TensorReport]:
        """Tensors that were left alone."""
        return [t for t in self.tensors if t.format is None]

    @property
    def bytes_before(self) -> int:
        """Bytes of all tensors in the source."""
        return sum(t.bytes_before for t in self.tensors)

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors in the output."""
        return sum(t.bytes_after for t in self.tensors)

    @property
    def bpw_quantized(self) -> float:
        """Bits per weight over the quantized tensors, all side data counted."""
        return _bpw(self.quantized)

    @property
    def bpw_whole(self) -> float:
        """Bits per weight over everything in the folder."""
        return _bpw(self.tensors)

    @property
    def error(self) -> float | None:
        """Relative square error over all quantized weights, each tensor counted by its size."""
        parts = [(t.error, t.numel) for t in self.quantized if t.error is not None]
        return sum(e * n for e, n in parts) / sum(n for _, n in parts) if parts else None

    def under(self) -> str:
        """The ceiling that was promised, in words."""
        return "" if self.ceiling is None else f", {size_text(self.ceiling)} allowed"

    @property
    def flagged(self) -> list[TensorReport]:
        """Tensors with which something looks wrong."""
        return [t for t in self.tensors if t.flags]

    def sums(self) -> dict[str, Any]:
        """Totals of sizes and errors."""
        keys = ("bytes_before", "bytes_after", "bpw_quantized", "bpw_whole", "error")
        return {key: getattr(self, key) for key in keys}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with stable keys."""
        return {
            "source": self.source,
            "output": self.output,
            **self.sums(),
            "seconds": round(self.seconds, 3),
            "peak_memory": self.peak_memory,
            "max_memory": self.ceiling,
            "acts": self.acts,
            "fallbacks": self.fallbacks,
            "url": self.url,
            "method": self.method,
            "recipe": self.recipe,
            "preflight": self.preflight,
            "account": self.account,
            "unread": self.unread,
            "tensors": [t.to_dict() for t in self.tensors],
        }


def totals_text(totals: dict[str, Any]) -> str:
    """The fates of a source's tensors in one line: `290 tensors = 210 quantized + 79 kept + 1 tied`, with bytes."""
    parts = (f"{part['tensors']} {name} ({size_text(part['bytes'])})" for name, part in totals.items() if name != "all")
    whole = totals["all"]
    return f"{whole['tensors']} tensors, {size_text(whole['bytes'])} = {' + '.join(parts)}"


__all__ = ["QuantizeReport", "TensorReport", "peak_memory", "relative_error", "relative_parts", "totals_text"]


def _bpw(tensors: list[TensorReport]) -> float:
    return 8 * sum(t.bytes_after for t in tensors) / max(1, sum(t.numel for t in tensors))


def relative_error(w: torch.Tensor, q: QTensor) -> float:
    """|w - wq|^2 / |w|^2; 0 for a weight that is all zeros. Works through a few rows at a time."""
    if len(q.shape) == 3:
        pairs = [(relative_parts(w[i], q.expert(i))) for i in range(q.shape[0])]
    else:
        pairs = [relative_parts(w, q)]
    loss, norm = (sum(p[i] for p in pairs) for i in (0, 1))
    return loss / norm if norm > 0 else 0.0


def relative_parts(w: torch.Tensor, q: QTensor) -> tuple[float, float]:
    """|w - wq|^2 and |w|^2 of a matrix."""
    whole = None if w.numel() > (1 << 24) else q.dequantize()
    step = max(1, (1 << 17) // w.shape[1])

    def job(start: int) -> tuple[float, float]:
        part = w[start : start + step].float()
        rows = torch.arange(start, start + part.shape[0])
        decoded = whole[start : start + step] if whole is not None else q.rows(rows)
        return _square_sum(part - decoded), _square_sum(part)

    sums = parallel_map(job, range(0, w.shape[0], step))
    return sum(s[0] for s in sums), sum(s[1] for s in sums)


def _square_sum(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
