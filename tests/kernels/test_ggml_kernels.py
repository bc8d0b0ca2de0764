"""ggml's blocks in the native core: every type, every instruction set of this machine.

Values are those of the `gguf` package, bit for bit. Products are compared with float64; the bound has two parts, half a
step of the 15 bits of activations for every weight, and (k + 16) roundings of float32 of sums whose terms are made of
codes without a sign, up to four times the largest weight.
"""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch

from bitfold import kernels
from bitfold.formats.families.ggml import GGML
from bitfold.formats.families.ggml_vectors import VECTORS
from bitfold.kernels.activations import quantize_tokens
from bitfold.qtensor import QTensor
from bitfold.system import native

gguf = pytest.importorskip("gguf", reason="the gguf package (dev extra) is the reference")

EPS = 2.0**-24
STEP = 1 / 16256
CORE = native.core()
ISAS = CORE.isas() if CORE else []
NATIVE = [name for name in GGML if CORE and name in CORE.ggml_types()]
# Where half-precision numbers are in a block.
HALVES = {"q4_1": (0, 2), "q5_1": (0, 2), "q4_k": (0, 2), "q5_k": (0, 2), "q2_k": (80, 82), "q3_k": (108,)}
HALVES |= {"q6_k": (208,), "tq2_0": (64,), "ggml_mxfp4": ()}


@pytest.fixture(params=ISAS)
def isa(request):
    before = CORE.isa()
    assert CORE.set_isa(request.param)
    yield request.param
    CORE.set_isa(before)


def random_blocks(name: str, n: int, k: int, seed: int = 0) -> QTensor:
    """Random bytes, but for scales: those are from 2**-5 to 2**-3, of either sign."""
    rng, format = np.random.default_rng(seed), GGML[name]
    size, nbytes = format.block
    raw = rng.integers(0, 256, (n * k // size, nbytes), dtype=np.uint8)
    for at in HALVES.get(name, (0,)):
        scale = rng.uniform(2.0**-5, 2.0**-3, len(raw)) * rng.choice([-1, 1], len(raw))
        raw[:, at : at + 2] = scale.astype(np.float16)[:, None].view(np.uint8)
    if name == "ggml_mxfp4":
        raw[:, 0] = rng.integers(120, 128, len(raw))
    return QTensor(format, (n, k), {"blocks": torch.from_numpy(raw).view(n, -1)})


def decoded(q: QTensor) -> torch.Tensor:
    state = kernels.KERNELS["ggml"].prepack(q, "float")
    out = torch.empty(q.shape)
    CORE.dequantize(state.weight, 0, q.shape[0], out.data_ptr(), 2)
    return out


def check(q: QTensor, x: torch.Tensor, act: str) -> None:
    kernel = kernels.KERNELS["ggml"]
    y = kernel.matmul(x, kernel.prepack(q, act)).double()
    seen = x.double()
    if act == "int8":
        codes, scale = quantize_tokens(x)
        seen = codes.double() * scale.double()
    w = q.dequantize().double()
    step = seen.abs().amax(1, keepdim=True) * STEP / 2 * w.abs().sum(1)
    sums = (q.shape[1] + 16) * EPS * seen.abs().sum(1, keepdim=True) * 4 * w.abs().amax(1)
    worst = ((y - seen @ w.T).abs() - step * 1.001 - sums).max()
    assert worst <= 0, f"{q.format.name} {act}: the error exceeds the bound by {float(worst):g}"


def test_the_core_knows_all_types_but_these():
    if CORE is None:
        pytest.skip("no native core in this installation")
    assert set(GGML) - set(NATIVE) == {"tq1_0", "iq1_s", "iq1_m", *VECTORS}


@pytest.mark.parametrize("name", NATIVE)
def test_values_are_the_reference_s_bit_for_bit(isa, name):
    size = GGML[name].block[0]
    for n, blocks in [(1, 1), (7, 3), (33, 4)]:
        q = random_blocks(name, n, blocks * size, seed=n)
        kind = gguf.GGMLQuantizationType[name.removeprefix("ggml_").upper()]
        want = gguf.quants.dequantize(q.fields["blocks"].numpy(), kind)
        assert np.array_equal(decoded(q).numpy().view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("act", kernels.ACTS)
@pytest.mark.parametrize("name", NATIVE)
def test_products_stay_within_the_bound(isa, name, act):
    size = GGML[name].block[0]
    for n, blocks in [(1, 1), (7, 3), (70, 4)]:
        q = random_blocks(name, n, blocks * size, seed=n)
        for m in (1, 2, 5, 9, 30):
            x = torch.randn(m, q.shape[1], generator=torch.Generator().manual_seed(m))
            x[0, 0] = 20  # the others get few of the 15 bits
            check(q, x, act)


@pytest.mark.parametrize("name", NATIVE)
def test_blocks_of_a_mapped_file_at_any_address(tmp_path, name):
    """Read where they are: nothing in front of the first block or behind the last, which ends a page, is touched."""
    size = GGML[name].block[0]
    n, k = 6, 3 * size
    q = random_blocks(name, n, k)
    raw = q.fields["blocks"].numpy().tobytes()
    start = mmap.PAGESIZE * (len(raw) // mmap.PAGESIZE + 1) - len(raw)
    (tmp_path / "weights").write_bytes(bytes(start) + raw)
    with (tmp_path / "weights").open("rb") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))[start:]
    blocks = torch.frombuffer(view, dtype=torch.uint8).view(n, -1)
    mapped = QTensor(q.format, q.shape, {"blocks": blocks})
    kernel, x = kernels.KERNELS["ggml"], torch.randn(3, k)
    state = kernel.prepack(mapped, "float")
    assert state.alive.data_ptr() == blocks.data_ptr()
    want = kernel.matmul(x, kernel.prepack(q, "float"))
    assert torch.allclose(kernel.matmul(x, state), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_rows_that_are_not_numbers_stay_by_themselves():
    q = random_blocks("q4_k", 5, 256)
    x = torch.ones(2, 256)
    x[0, 3] = float("nan")
    for act in kernels.ACTS:
        kernel = kernels.select(q, act)
        y = kernel.matmul(x, kernel.prepack(q, act))
        assert kernel.name == "ggml" or CORE is None
        assert not y[0].isfinite().any()
        assert y[1].isfinite().all()


def test_gradients_of_activations_are_those_of_the_decoded_weight():
    q = random_blocks("q5_0", 9, 64)
    x = torch.randn(3, 64, requires_grad=True)
    kernel = kernels.select(q, "float")
    kernel.matmul(x, kernel.prepack(q, "float")).sum().backward()
    assert torch.allclose(x.grad, q.dequantize().sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)
