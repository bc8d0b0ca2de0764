"""Randomised Hadamard rotation of the inputs of a layer.

y = x W^T = (x R) (W R)^T for orthogonal R = diag(s) H / sqrt(k), s random signs, H a Hadamard matrix: every new input
is a signed mean of all old ones, so that rows become nearly normal and outliers spread (QuIP#, Tseng et al. 2024;
QuaRot, Ashkboos et al. 2024). H is a Kronecker product of small factors, each applied as one small matrix product:
O(k (sum of the factors)) numbers a row, not O(k^2). Sizes whose odd part has no Hadamard matrix of a handy order are
rotated in blocks of the largest power of two that divides them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from bitfold.system.backend import CPU
from bitfold.system.tensorinfo import TensorInfo
from bitfold.transforms.rotation import rotate, rotates

_ROWS = 512  # of a Hessian rotated at a time
_LARGEST_PALEY = 2048  # order of the one factor that is not; a checkpoint must not make us build a huge one
_LARGEST = 64  # order of a factor made of powers of two: one small product each


@dataclass(frozen=True)
class Hadamard:
    """A randomised Hadamard rotation.

    Args:
        size: number of inputs k, at least 1.
        seed: of the signs.
    """

    size: int
    seed: int = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., k) -> x R, same dtype; float32 or wider inside."""
        if rotates(x):
            return rotate(x, self.size, self.seed, inverse=False)
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        return _kronecker(wide * signs(self.size, self.seed, x.device).to(wide.dtype), factors(self.size, x.device)).to(
            x.dtype
        )

    def weights(self, w: torch.Tensor) -> torch.Tensor:
        """Weights (..., k) in the new basis, W R."""
        return self(w)

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """x R -> x, W R -> W: the transposed factors, then the signs."""
        if rotates(x):
            return rotate(x, self.size, self.seed, inverse=True)
        transposed = tuple(h.T.contiguous() for h in factors(self.size, x.device))
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        return (_kronecker(wide, transposed) * signs(self.size, self.seed, x.device).to(wide.dtype)).to(x.dtype)

    def hessian(self, h: torch.Tensor) -> torch.Tensor:
        """Second moment of the inputs (k, k) -> that of the rotated ones, R^T H R."""
        out = torch.empty_like(h)
        for at in range(0, len(h), _ROWS):
            out[at : at + _ROWS] = self(h[at : at + _ROWS])
        for at in range(0, len(h), _ROWS):
            out[:, at : at + _ROWS] = self(out[:, at : at + _ROWS].T).T
        return out

    def describe(self) -> dict[str, Any]:
        """JSON-able."""
        return {"kind": "hadamard", "size": self.size, "seed": self.seed}

    def layout(self) -> dict[str, TensorInfo]:
        """Tensors stored beside the weight: none, signs come from the seed."""
        return {}

    def fields(self) -> dict[str, torch.Tensor]:
        """None."""
        return {}

    def with_fields(self, fields: Mapping[str, torch.Tensor]) -> Hadamard:
        """Itself."""
        return self


@lru_cache(maxsize=64)
def signs(size: int, seed: int, device: torch.device = CPU) -> torch.Tensor:
    """float32 +1 and -1, one for each input: the top bits of splitmix64 of (seed, index), the same everywhere."""
    mask = (1 << 64) - 1
    out, state = [], (seed * 0x9E3779B97F4A7C15) & mask
    for _ in range(size):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(-1.0 if (z ^ (z >> 31)) >> 63 else 1.0)
    return torch.tensor(out).to(device)


def _kronecker(x: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """x (..., k) times the Kronecker product of the parts (blocks of it where their orders do not multiply to k)."""
    orders = [len(h) for h in parts]
    shape = x.shape
    y = x.reshape(-1, *orders)  # where the orders do not multiply to k, each block is a row of its own
    for axis, h in enumerate(parts):
        y = torch.movedim(torch.movedim(y, axis + 1, -1) @ h.to(y.dtype), -1, axis + 1)
    return y.reshape(shape)


@lru_cache(maxsize=64)
def factors(size: int, device: torch.device = CPU) -> tuple[torch.Tensor, ...]:
    """Orthogonal factors whose Kronecker product, repeated in blocks if need be, rotates `size` inputs."""
    odd, twos = size, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    parts: list[torch.Tensor] = []
    if odd > 1:
        for used in range(2, min(twos, 6) + 1):
            special = _paley(odd << used) if odd << used <= _LARGEST_PALEY else None
            if special is not None:
                parts, twos = [special / math.sqrt(len(special))], twos - used
                break
    while twos > 0:
        used = min(twos, int(math.log2(_LARGEST)))
        parts.append(_sylvester(used) / math.sqrt(1 << used))
        twos -= used
    return tuple(part.to(device) for part in parts)


def _sylvester(log2: int) -> torch.Tensor:
    h, two = torch.ones(1, 1), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    for _ in range(log2):
        h = torch.kron(h, two)
    return h


def _paley(order: int) -> torch.Tensor | None:
    """Hadamard matrix of order q + 1 (q = 3 mod 4) or 2 (q + 1) (q = 1 mod 4), q prime; else None (Paley 1933)."""
    q = order - 1
    if q % 4 == 3 and _is_prime(q):
        return _conference(q, skew=True) + torch.eye(order)
    q = order // 2 - 1
    if order % 2 == 0 and q % 4 == 1 and _is_prime(q):
        plus, minus = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        return torch.kron(_conference(q, skew=False), plus) + torch.kron(torch.eye(q + 1), minus)
    return None


def _conference(q: int, *, skew: bool) -> torch.Tensor:
    """Bordered matrix of quadratic residues: zero diagonal, C C^T = q I."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)])
    c = torch.zeros(q + 1, q + 1)
    c[0, 1:], c[1:, 0] = 1.0, -1.0 if skew else 1.0
    index = torch.arange(q)
    c[1:, 1:] = character[(index[:, None] - index[None, :]) % q]
    return c


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, math.isqrt(q) + 1))
