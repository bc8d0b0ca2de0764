"""LLM.int8(): laws of the mixed product, and what repairs W8A8 under real outliers."""

from __future__ import annotations

import math

import pytest
import torch

from bitfold.errors import RecipeError, UsageError
from bitfold.formats import FORMATS, Format
from bitfold.kernels.activations import quantize_tokens
from bitfold.methods.quantize import quantize_tensor
from bitfold.nn import QLinear
from bitfold.recipes.recipe import Rule
from bitfold.transforms import Hadamard
from bitfold.transforms.activations import Act, read_act
from numerics import check_product

COLUMNS = [name for name, f in FORMATS.items() if f.decode_columns]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    """Seeded normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outlier_problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Activations with one channel scaled by 60, and weights with that channel divided: the product is unchanged."""
    x, w = gaussian(64, 256, seed=1), gaussian(96, 256, seed=2)
    x[:, 17] *= 60
    w[:, 17] /= 60
    return x, w


def relative_error(layer: QLinear, x: torch.Tensor, w: torch.Tensor) -> float:
    """|layer(x) - x W^T| / |x W^T|."""
    exact = x.double() @ w.double().T
    return float((layer(x).double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", ["int8", "int8-g64", "int4-asym-g64", "nf4", "e8p", "bf16"])
@pytest.mark.parametrize("rows", [1, 40])
def test_ends_of_the_threshold(name: str, rows: int) -> None:
    """Threshold 0 is the float product and an infinite one the int8 product."""
    w, x = gaussian(48, 128), gaussian(rows, 128, seed=1) * 3
    q = quantize_tensor(w, name)
    check_product(QLinear(q, act="int8-mixed:0")(x), x, q.dequantize())
    codes, scale = quantize_tokens(x)
    check_product(QLinear(q, act="int8-mixed:inf")(x), codes.double() * scale.double(), q.dequantize())


@pytest.mark.parametrize("name", ["int8", "int3-g64", "nf4-dq", "ternary", "e8p", "trellis-3"])
def test_outlier_columns_are_exact(name: str) -> None:
    """Only columns 3 and 70 reach the threshold: the rest is what int8 makes of the batch without them."""
    w, x = gaussian(32, 128), gaussian(5, 128, seed=1).clamp(-4, 4)
    x[2, 3], x[0, 70] = 9.0, -6.0
    q = quantize_tensor(w, name)
    columns = torch.tensor([3, 70])
    near = x.index_fill(1, columns, 0.0)
    expected = QLinear(q, act="int8")(near).double() + x[:, columns].double() @ q.dequantize()[:, columns].double().T
    found = QLinear(q, act="int8-mixed:6.0")(x).double()
    bound = 130 * 2**-23 * (x.abs().double() @ q.dequantize().abs().double().T)  # float32 sums in another order
    assert ((found - expected).abs() <= bound).all()


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("shape", [(6, 512), (5, 203)], ids=str)
def test_columns_are_columns(name: str, shape: tuple[int, int]) -> None:
    """decode_columns gives the columns of decode, in any order and more than once, the last one included."""
    q = quantize_tensor(gaussian(*shape), name)
    index = torch.tensor([shape[1] - 1, 0, 7, 130, 7, 64])
    found = FORMATS[name].decode_columns(q.fields, q.shape, index)  # type: ignore[attr-defined]
    assert torch.equal(found, q.dequantize()[:, index])


def test_every_grid_format_decodes_columns() -> None:
    """So that outliers cost only their columns."""
    assert all(name in COLUMNS for name, f in FORMATS.items() if isinstance(f, Format))


def test_one_large_channel_breaks_w8a8_and_is_repaired() -> None:
    """One input channel times 60, its weights divided: plain int8 activations lose the other channels."""
    x, w = outlier_problem()
    q = quantize_tensor(w, "int8", fit="mse")
    plain, mixed, weights = (relative_error(QLinear(q, act=a), x, w) for a in ("int8", "int8-mixed:6.0", "float"))
    assert plain > 0.1
    # What is left is the rounding of the small weights of that channel, which float activations suffer as well.
    assert mixed < 1.05 * weights < 0.3 * plain
    turn = Hadamard(256, 1)
    rotated = QLinear(quantize_tensor(turn(w), "int8", fit="mse"), transform=turn, act="int8")
    assert relative_error(rotated, x, w) < 0.3 * plain  # the channel is spread over all


def test_gradients() -> None:
    """Those of the float product: rounding is passed straight through, outliers are exact."""
    w = gaussian(32, 128)
    x = (gaussian(6, 128, seed=1) * 3).requires_grad_()
    layer = QLinear(quantize_tensor(w, "int8"), act="int8-mixed:6.0")
    layer(x).square().sum().backward()
    found = x.grad
    y = layer(x).detach()
    assert found is not None
    assert torch.allclose(found, 2 * y @ layer.weight.qtensor.dequantize(), rtol=1e-4, atol=1e-3)


def test_not_a_number_and_infinity() -> None:
    """They come out as such, never as plausible numbers."""
    q = quantize_tensor(gaussian(8, 64), "int8")
    x = gaussian(2, 64)
    x[0, 5], x[1, 7] = math.nan, math.inf
    y = QLinear(q, act="int8-mixed:6.0")(x)
    assert not torch.isfinite(y).any()


def test_names() -> None:
    """What rules accept, and what they do not."""
    assert read_act("int8-mixed") == read_act("int8-mixed:6.0") == Act("int8", 6.0)
    assert read_act("int8-mixed:inf").threshold == math.inf
    for bad in ("int4", "int8-mixed:x", "int8-mixed:-1", "int8-mixed:nan", "int8-mixed:", "int8:6"):
        with pytest.raises(UsageError):
            read_act(bad)
    scheme = Rule("*", "int8", act="int8-mixed:5").scheme
    assert scheme is not None
    assert scheme.activations == Act("int8", 5.0)
    assert read_act(scheme.activations.name) == scheme.activations
    with pytest.raises(RecipeError, match="no threshold"):
        Rule("*", "int8", act="int8-mixed:x")
