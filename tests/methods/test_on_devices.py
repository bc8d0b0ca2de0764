"""Methods on every device: the same bytes where nothing is summed in an order of its own, else the same loss."""

from __future__ import annotations

import pytest
import torch

from bitfold import QTensor, quantize_tensor
from bitfold.formats import get_format
from bitfold.formats.families.trellis_tables import CODES
from bitfold.formats.families.viterbi import encode_tiles
from bitfold.methods.gptq import proxy_loss
from bitfold.system import backend

N, K = 40, 96


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def hessian() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(400, K, generator=generator) * torch.linspace(0.2, 3, K)
    x[:, 1:] += 0.7 * x[:, :-1]
    return x.T @ x / len(x)


def home(q: QTensor) -> QTensor:
    return QTensor(q.format, q.shape, {name: field.cpu() for name, field in q.fields.items()})


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_the_search_finds_the_path_of_the_cpu(code, device, monkeypatch):
    monkeypatch.setattr(backend, "scratch", lambda _: 4 << 20)  # a few tiles at a time
    thorough = code.bits == 2
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(code.bits)) * code.sigma
    x[3, 5:60] = torch.nan
    x[4] = 0.0  # ties
    tiles, values = encode_tiles(code, x, thorough=thorough)
    there = encode_tiles(code, x.to(device), thorough=thorough)
    assert there[0].device.type == device.type
    assert torch.equal(there[0].cpu(), tiles)
    assert torch.equal(there[1].cpu(), values)


@pytest.mark.parametrize("fit", ["absmax", "minmax"])
@pytest.mark.parametrize(
    "name",
    ["int4-g64", "int3-asym-g64", "int4-affine-g64", "int8-tensor", "nf4", "mxfp4", "nvfp4", "fp8-e4m3", "ternary"],
)
def test_rounding_to_nearest_gives_the_bytes_of_the_cpu(name, fit, device):
    here, there = quantize_tensor(weight(), name, fit=fit), quantize_tensor(weight().to(device), name, fit=fit)
    for field, value in here.fields.items():
        assert torch.equal(there.fields[field].cpu(), value), field


@pytest.mark.parametrize("fit", ["mse", "hqq"])
@pytest.mark.parametrize("name", ["int4-g64", "int3-asym-g64", "int4-affine-g64", "nf4"])
def test_searched_scales_are_as_good(name, fit, device):
    w = weight()
    errors = [
        float((home(quantize_tensor(x, name, fit=fit)).dequantize() - w).square().sum()) for x in (w, w.to(device))
    ]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "method"), [("int4-g64", "gptq"), ("int3-asym", "ldlq"), ("nf4", "gptq"), ("trellis-2", "ldlq")]
)
def test_error_feedback_loses_as_little(name, method, device):
    w, h = weight(), hessian()
    if name.startswith("trellis"):  # each tile is a search of its own, and takes a second on a pretended device
        w, h = w[:20, :48], h[:48, :48]
    how = {"method": method, "fit": "absmax"}
    here = quantize_tensor(w, name, hessian=h, **how)
    there = home(quantize_tensor(w.to(device), name, hessian=h.to(device), **how))
    losses = [proxy_loss(w, q.dequantize(), h) for q in (here, there)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] < proxy_loss(w, quantize_tensor(w, name).dequantize(), h)


def test_row_scales_stay_where_the_weight_is(device):
    assert get_format("trellis-2").row_scale(weight().to(device)).device.type == device.type
