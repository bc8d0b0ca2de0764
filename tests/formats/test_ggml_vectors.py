"""Writing ggml's vector types: the search for points and signs, scales, error feedback."""

from __future__ import annotations

import pytest
import torch

from bitfold.formats.base import Params
from bitfold.formats.families.ggml import GGML
from bitfold.formats.families.ggml_points import points
from bitfold.formats.families.ggml_vector_search import nearest
from bitfold.formats.families.ggml_vectors import VECTORS, VectorType, even_signs
from bitfold.methods.gptq import ldlq, proxy_loss
from bitfold.methods.quantize import quantize_tensor

TYPES = [pytest.param(type, id=name) for name, type in VECTORS.items()]
N, K = 24, 512


def metric(seed: int) -> torch.Tensor:
    half = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))
    return half @ half.T / 8 + torch.diag(torch.linspace(0.1, 1, 8))


def targets(type: VectorType, count: int, seed: int = 0) -> torch.Tensor:
    """Half of the largest magnitude is where 98 % lie."""
    wide = float(points(type.name).max()) / 4
    return torch.randn(1, count, 8, generator=torch.Generator().manual_seed(seed)) * wide


def cost(x: torch.Tensor, values: torch.Tensor, under: torch.Tensor) -> torch.Tensor:
    error = (x - values).double()
    return ((error @ under.double()) * error).sum(-1)


def weight() -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(1)) * 0.02


def moments() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2 * K, K, generator=generator) * torch.rand(K, generator=generator)
    return x.T @ (x + x.roll(1, 1)) / len(x) / 2 + (x.T @ (x + x.roll(1, 1)) / len(x) / 2).T


def no_fit(*_: object) -> Params:
    raise AssertionError("blocks choose their own scales")


@pytest.mark.parametrize("type", TYPES)
def test_what_is_found_is_made_of_points_and_allowed_signs(type: VectorType) -> None:
    for under in (metric(1)[None], metric(1).diagonal()[None]):
        found = nearest(type, targets(type, 300), under)
        magnitudes = points(type.name)[found.points].flatten(2).float()
        assert torch.equal(found.values, torch.where(found.negative, -magnitudes, magnitudes))
        if type.parity:
            assert not (found.negative.sum(2) % 2).any()


@pytest.mark.parametrize("type", [VECTORS["iq2_xxs"], VECTORS["iq2_xs"]], ids=lambda t: t.name)
def test_little_is_lost_to_the_best_of_all(type: VectorType) -> None:
    x, under = targets(type, 12), metric(3)
    signs = even_signs(torch.arange(128))[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    every = points(type.name).float()[None] * (1 - 2 * signs.float())[:, None]  # (128, p, 8)
    best = torch.stack([cost(row, every, under).min() for row in x[0]])
    found = cost(x[0], nearest(type, x, under[None]).values[0], under)
    assert (found >= best - 1e-4 * best).all()
    assert found.sum() <= 1.15 * best.sum()


@pytest.mark.parametrize("type", TYPES)
def test_no_other_point_with_the_same_signs_is_nearer(type: VectorType) -> None:
    """Under costs of each coordinate alone, where the points of four do not know of each other."""
    x, under = targets(type, 50, seed=4), metric(5).diagonal()
    found, table = nearest(type, x, under[None]), points(type.name).float()
    dims = table.shape[1]
    for at in range(0, 8, dims):
        part = slice(at, at + dims)
        sign = torch.where(found.negative[0, :, part], -1.0, 1.0)
        costs = ((x[0, :, None, part] - table * sign[:, None]).square() * under[part]).sum(2)
        chosen = costs.gather(1, found.points[0, :, at // dims, None])[:, 0]
        assert (chosen <= costs.min(1).values * (1 + 1e-4)).all()


@pytest.mark.parametrize("name", VECTORS)
def test_the_coder_says_what_its_blocks_decode_to(name: str) -> None:
    w, format = weight(), GGML[name]
    assert format.coder is not None
    coder = format.coder(w, None, None)
    said = torch.cat([coder.encode(w[:, at : at + 8], at) for at in range(0, K, 8)], 1)
    assert torch.equal(format.decode(coder.fields(), (N, K)), said)


@pytest.mark.parametrize("name", VECTORS)
def test_feedback_under_the_hessian_loses_much_less(name: str) -> None:
    w, h, format = weight(), moments(), GGML[name]
    plain = format.decode(format.weighted(w, h.diagonal()), (N, K))
    fed = ldlq(w, h, format, no_fit, refit=False).dequantize()
    refitted = ldlq(w, h, format, no_fit).dequantize()
    assert proxy_loss(w, fed, h) < 0.8 * proxy_loss(w, plain, h)
    assert proxy_loss(w, refitted, h) <= proxy_loss(w, fed, h) * (1 + 1e-6)


@pytest.mark.parametrize("name", VECTORS)
def test_important_columns_lose_less(name: str) -> None:
    w, importance, format = weight(), torch.ones(K), GGML[name]
    importance[::4] = 100.0
    losses = []
    for given in (None, importance):
        error = (format.decode(format.weighted(w, given), (N, K)) - w).square()
        losses.append(float((error * importance).sum()))
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", VECTORS)
def test_weights_that_are_no_numbers_of_their_own(name: str) -> None:
    """Rows and blocks of zeros, constants, inputs that never come, huge and tiny rows: finite, and zeros stay zeros."""
    w, h = weight(), moments()
    w[0], w[1, :256], w[2], w[3] = 0.0, 0.0, 0.01, w[3] * 1e4
    w[4] *= 1e-9
    h[:, 5] = h[5] = 0.0
    h[:, 8:16] = h[8:16] = 0.0
    found = quantize_tensor(w, name, method="ldlq", hessian=h).dequantize()
    assert torch.isfinite(found).all()
    assert not found[0].any()
    assert (found[3] - w[3]).norm() < 0.5 * w[3].norm()
