"""On every device: weights decode to the bits that the CPU decodes, and multiply as they should."""

from __future__ import annotations

import shutil

import pytest
import torch

from bitfold import FORMATS, QTensor, quantize_tensor
from bitfold.errors import FormatError
from bitfold.kernels.reference import compiled_decoder, reference
from bitfold.nn import QEmbedding, QLinear
from bitfold.system import backend
from bitfold.transforms import Hadamard

N, K = 70, 512
_FAMILIES = ("int3", "int4-asym-g64", "ternary", "nf4", "mxfp8", "nvfp4", "trellis-2", "trellis-3", "e8p", "aqlm-2x8")


@pytest.fixture(scope="module")
def weights() -> dict[str, QTensor]:
    """One of each format that can be written."""
    torch.manual_seed(0)
    w, found = torch.randn(N, K), {}
    for name in FORMATS:
        try:
            found[name] = quantize_tensor(w, name)
        except FormatError:  # read only
            continue
    return found


def moved(q: QTensor, device: torch.device) -> QTensor:
    return QTensor(q.format, q.shape, {name: field.to(device) for name, field in q.fields.items()})


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_decodes_to_the_bits_of_the_cpu(name, weights, device):
    if name not in weights:
        pytest.skip("a format that can only be read")
    q, index = weights[name], torch.tensor([3, 60, 3])
    there = moved(q, device)
    values = there.dequantize()
    assert values.device == there.fields[next(iter(there.fields))].device
    assert torch.equal(values.cpu(), q.dequantize())
    assert torch.equal(there.rows(index.to(device)).cpu(), q.rows(index))
    take = q.format.decode_columns
    if take is not None:
        columns = take(there.fields, q.shape, index.to(device)).cpu()
        assert torch.equal(columns, take(q.fields, q.shape, index))


@pytest.mark.parametrize("name", FORMATS)
def test_stacks_of_experts_decode_there_too(name, weights, device):
    if name not in weights:
        pytest.skip("a format that can only be read")
    q = weights[name]
    both = QTensor(q.format, (2, N, K), {n: torch.stack([f, f]).to(device) for n, f in q.fields.items()})
    assert torch.equal(both.dequantize().cpu(), torch.stack([q.dequantize()] * 2))


@pytest.mark.parametrize("act", ["float", "int8", "int8-mixed:2.5"])
@pytest.mark.parametrize("name", _FAMILIES)
def test_a_layer_multiplies_there(name, act, weights, device):
    q = weights[name]
    layer = QLinear(q, torch.arange(float(N)), Hadamard(K), act=act).to(device)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(1))
    y = layer(x.to(device)).cpu().double()
    turned, w = Hadamard(K)(x).double(), q.dequantize().double()
    exact = turned @ w.T + torch.arange(float(N))
    # A rounding of each product and sum; with rounded activations half a step of each, and what rotating does to it.
    bound = (2 * K + 16) * 2.0**-24 * (turned.abs() @ w.abs().T + N)
    if act != "float":
        bound = bound + turned.abs().amax(1, keepdim=True) / 127 * w.abs().sum(1)
    assert ((y - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_activations_meet_narrow_weights(dtype, weights, device):
    q = weights["int4-g64"]
    x = torch.randn(40, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = QLinear(q).to(device)(x.to(device)).cpu().double()
    exact = x.double() @ q.dequantize().double().T
    step = torch.finfo(dtype).eps
    assert ((y - exact).abs() <= 2 * step * (x.double().abs() @ q.dequantize().double().abs().T)).all()


@pytest.mark.parametrize("kind", backend.present())  # the engine of autograd knows no pretended device
def test_gradients_go_through_the_plain_route(kind, weights):
    device = torch.device(kind)
    q = weights["trellis-2"]
    x = torch.randn(3, K).to(device).requires_grad_()
    y = reference.matmul(x, reference.prepack(moved(q, device), "float"))
    (back,) = torch.autograd.grad(y, x, torch.ones(3, N).to(device))
    expected = torch.ones(3, N) @ q.dequantize()
    assert torch.allclose(back.cpu(), expected, atol=1e-3 * float(expected.abs().max()))


def test_a_ceiling_cuts_weights_into_tiles(weights, device, monkeypatch):
    q = quantize_tensor(torch.randn(600, 64), "int4-g64")
    monkeypatch.setattr(backend, "scratch", lambda _: 256 * 64 * 24)
    x = torch.randn(2, 64)
    y = reference.matmul(x.to(device), reference.prepack(moved(q, device), "float")).cpu()
    assert torch.allclose(y, x @ q.dequantize().T, atol=1e-4)


def test_a_table_is_looked_up_there(weights, device):
    table = QEmbedding(weights["nf4"]).to(device)
    ids = torch.tensor([[4, 69, 4]])
    assert torch.equal(table(ids.to(device)).cpu(), weights["nf4"].dequantize()[ids])


def test_fields_keep_their_dtypes_on_the_way(weights, device):
    layer = QLinear(weights["nf4"]).to(device, torch.bfloat16)
    assert all(f.dtype == weights["nf4"].fields[n].dtype for n, f in layer.weight.qtensor.fields.items())
    assert layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("size", [64, 96, 768])
def test_rotations_turn_and_turn_back(size, device):
    x = torch.randn(7, size)
    turn = Hadamard(size, 3)
    there = turn(x.to(device))
    assert torch.allclose(there.cpu(), turn(x), atol=1e-5)
    assert torch.allclose(turn.inverse(there).cpu(), x, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler")
@pytest.mark.parametrize("name", _FAMILIES)
def test_compiled_decoding_gives_the_same_bits(name, weights):
    q = weights[name]
    compiled = compiled_decoder(q.format, q.shape, torch.float32)
    assert torch.equal(compiled(dict(q.fields)), q.dequantize())
