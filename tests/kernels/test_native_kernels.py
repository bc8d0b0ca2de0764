"""Every kernel, every format it accepts, odd shapes, every instruction set of this machine, against float64.

The bound is derived, not chosen by eye: a sum of k products in float32, in any order, is off by at most (k + 8) * eps *
sum |x| |w|, where |w| counts the point and the zero point before they cancel, and eps = 2**-24.
"""

from __future__ import annotations

import functools
import sys

import pytest
import torch

from bitfold import kernels
from bitfold.errors import FormatError, UsageError
from bitfold.formats import FORMATS, get_format
from bitfold.kernels.activations import quantize_tokens
from bitfold.kernels.layout import read_layout, read_spec, write_spec
from bitfold.methods.fits import FITS
from bitfold.qtensor import QTensor
from bitfold.system import native

EPS = 2.0**-24
CORE = native.core()
ISAS = CORE.isas() if CORE else []
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.fixture(params=ISAS)
def isa(request):
    before = CORE.isa()
    assert CORE.set_isa(request.param)
    yield request.param
    CORE.set_isa(before)


@functools.cache
def sample(name: str, n: int, k: int, seed: int = 0) -> QTensor:
    format = get_format(name)
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    params = None if format.scale is None else FITS["absmax"](w, format, None)
    return QTensor(format, (n, k), format.encode(w, params))


def activations(m: int, k: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed))


def magnitude(q: QTensor) -> torch.Tensor:
    """Largest |weight| before zero points cancel, as float64 (n, 1)."""
    params = q.format.load_params(q.fields, q.shape) if q.format.grid else None
    w = q.dequantize().double().abs().amax(1, keepdim=True)
    if params is None or params.zero_point is None:
        return w
    return w + (params.scale.double() * (params.zero_point.double().abs() + 2.0**8)).abs().amax(1, keepdim=True)


def seen(x: torch.Tensor, act: str) -> torch.Tensor:
    """The activations that the product is of, as float64: those that 8 bits leave, or all of it."""
    if act != "int8":
        return x.float().double()
    codes, scale = quantize_tokens(x.float())
    return codes.double() * scale.double()


def exact(q: QTensor, x: torch.Tensor, act: str) -> torch.Tensor:
    """The product in float64 (m, n)."""
    return seen(x, act) @ q.dequantize().double().T


def within(y: torch.Tensor, q: QTensor, x: torch.Tensor, act: str) -> None:
    """Whether y is the product, up to the bound."""
    bound = (q.shape[1] + 8) * EPS * seen(x, act).abs().sum(1, keepdim=True) * magnitude(q).T
    assert y.shape == bound.shape
    worst = ((y.double() - exact(q, x, act)).abs() - bound).max() if y.numel() else torch.tensor(-1.0)
    assert worst <= 0, f"{q.format.name} {act}: error exceeds the bound by {float(worst):g}"


def check(q: QTensor, x: torch.Tensor, act: str, name: str | None = None) -> None:
    kernel = kernels.select(q, act, name=name)
    within(kernel.matmul(x, kernel.prepack(q, act)), q, x, act)


def encodable(name: str) -> bool:
    """ggml's types come from files: some have no encoder here."""
    try:
        return bool(sample(name, 2, 256).nbytes)
    except FormatError:
        return False


ENCODABLE = [name for name in FORMATS if encodable(name)]
NATIVE = [name for name in ENCODABLE if CORE and kernels.KERNELS["cpu"].accepts(sample(name, 5, 256), "float")]


def test_the_native_kernel_takes_the_formats_it_is_made_for():
    if CORE is None:
        pytest.skip("no native core in this installation")
    wanted = {f"int{b}{z}{g}" for b in range(2, 9) for z in ("", "-asym") for g in ("", "-g64")}
    wanted |= {f"trellis-{k}" for k in (1, 2, 3, 4)}
    wanted |= {"int1", "nf4", "fp4", "mxfp4", "nvfp4", "nf4-dq", "ternary", "int8-tensor", "int4-affine-g64"}
    assert wanted <= set(NATIVE)


@pytest.mark.parametrize("act", kernels.ACTS)
@pytest.mark.parametrize("name", NATIVE)
def test_native_kernels_stay_within_the_bound(isa, name, act):
    for n, k in [(1, 1), (37, 211), (66, 64), (5, 577)]:
        q = sample(name, n, k)
        for m in (1, 3, 17, 64):
            check(q, activations(m, k), act, "cpu")


@pytest.mark.parametrize("act", kernels.ACTS)
def test_lattice_weights_stay_within_the_bound(isa, act):
    """Pieces of rows that do not divide, edges of blocks of eight, one row of activations and more."""
    for n, k in [(1, 1), (37, 211), (66, 64), (300, 2053)]:
        for m in (1, 3, 16, 40):
            check(sample("e8p", n, k), activations(m, k), act, "lattice")


@pytest.mark.parametrize("act", kernels.ACTS)
@pytest.mark.parametrize("name", [n for n in ENCODABLE if n[:3] not in ("int", "tre") or n in ("int4", "int8")])
def test_the_reference_accepts_everything(name, act):
    check(sample(name, 19, 256), activations(3, 256), act, "reference")


def test_the_reference_decodes_in_chunks(monkeypatch):
    monkeypatch.setattr(sys.modules["bitfold.kernels.reference"], "_CHUNK", 1000)
    check(sample("int4-g64", 51, 130), activations(4, 130), "float", "reference")


@pytest.mark.parametrize("group", [1, 5, 16, 24, 32, 48, 80, 96, 100, 128, 1000])
@pytest.mark.parametrize("act", kernels.ACTS)
def test_groups_of_any_size(isa, group, act):
    for name in (f"int4-asym-g{group}", f"nf4-g{group}"):
        q = sample(name, 9, 333)
        native_too = read_layout(q) is not None
        assert native_too == (group % 16 == 0 or group >= 333)
        for m in (1, 5, 20):
            check(q, activations(m, 333), act)


@pytest.mark.parametrize("name", ["int8", "int4-g64", "nf4", "trellis-3", "fp32"])
@pytest.mark.parametrize("act", kernels.ACTS)
def test_empty_and_not_contiguous(name, act):
    q = sample(name, 7, 64)
    kernel = kernels.select(q, act)
    state = kernel.prepack(q, act)
    assert kernel.matmul(torch.empty(0, 64), state).shape == (0, 7)
    x = activations(64, 10).T
    for same in (x, x.contiguous(), x.bfloat16(), x.half(), x.double()):
        check(q, same, act)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("act", kernels.ACTS)
@pytest.mark.parametrize("m", [2, 40])
@pytest.mark.parametrize("name", ["int8", "trellis-2", "e8p"])
def test_nan_and_infinity_stay_in_their_row(name, value, act, m):
    q = sample(name, 6, 100)
    x = activations(m, 100)
    clean = x.clone()
    x[1, 7] = value
    able = [kernel for kernel in kernels.KERNELS.values() if kernel.accepts(q, act)]
    assert len(able) >= 2
    for kernel in able:
        y = kernel.matmul(x, kernel.prepack(q, act))
        assert not torch.isfinite(y[1]).any()
        assert torch.isfinite(y).all(1).tolist() == [i != 1 for i in range(m)]
        y[1] = exact(q, clean, act)[1]
        within(y, q, clean, act)


def test_int8_rounding_is_the_reference_bit_for_bit(isa):
    """An int8 identity lays the codes open: y = code * 127 * ..."""
    q = QTensor(get_format("int8"), (64, 64), get_format("int8").encode(torch.eye(64) * 127, _unit_scale(64)))
    x = activations(33, 64) * torch.logspace(-30, 30, 33)[:, None]
    x[5] = 0
    kernel = kernels.select(q, "int8", name="cpu")
    codes, scale = quantize_tokens(x)
    for rows in (slice(0, 1), slice(0, 8), slice(0, 33)):
        y = kernel.matmul(x[rows], kernel.prepack(q, "int8"))
        assert torch.equal(y, codes[rows].float() * 127 * scale[rows])


def _unit_scale(n: int):
    from bitfold.formats import Params

    return Params(torch.ones(n, 1))


@pytest.mark.parametrize("act", kernels.ACTS)
@pytest.mark.parametrize("name", ["int4-asym-g64", "nf4", "int8", "trellis-2", "bf16"])
def test_gradients_of_the_activations(name, act):
    q = sample(name, 12, 70)
    for m in (3, 40):
        x = activations(m, 70).requires_grad_()
        kernel = kernels.select(q, act)
        y = kernel.matmul(x, kernel.prepack(q, act))
        seed = activations(m, 12, seed=5)
        y.backward(seed)
        torch.testing.assert_close(x.grad, seed @ q.dequantize(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["int4-asym-g64", "trellis-2"])
def test_the_operator_is_sound(name):
    if CORE is None:
        pytest.skip("no native core in this installation")
    w = read_layout(sample(name, 12, 130))
    x = activations(3, 130).requires_grad_()
    args = (x, w.codes, w.scale, w.zero, write_spec(w.spec), False)
    torch.library.opcheck(torch.ops.bitfold.linear.default, args, test_utils=OPCHECKS)


@pytest.mark.parametrize("name", ["int4-g64", "trellis-2"])
def test_torch_compile_sees_one_operator(name):
    if CORE is None:
        pytest.skip("no native core in this installation")
    q = sample(name, 12, 128)
    kernel = kernels.select(q, "float", name="cpu")
    state = kernel.prepack(q, "float")
    x = activations(3, 128)
    compiled = torch.compile(lambda x: kernel.matmul(x, state) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), kernel.matmul(x, state) * 2)


@pytest.mark.parametrize("act", kernels.ACTS)
@pytest.mark.parametrize("name", ["int4-g64", "nf4", "trellis-2"])
def test_threads_do_not_change_a_bit(name, act):
    """Of the core's own loops. What PyTorch multiplies (float, many rows) stays within the bound."""
    q, before = sample(name, 300, 256), torch.get_num_threads()
    own = CORE is not None and act == "int8" and name != "nf4"
    try:
        for m in (1, 4, 50):
            kernel, outcomes = kernels.select(q, act), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                outcomes.append(kernel.matmul(activations(m, 256), kernel.prepack(q, act)))
                within(outcomes[-1], q, activations(m, 256), act)
            assert not own or all(torch.equal(outcomes[0], other) for other in outcomes)
    finally:
        torch.set_num_threads(before)


def test_select_refuses_nonsense():
    q = sample("fp8-e4m3", 4, 8)
    with pytest.raises(UsageError, match="unknown activation type 'int4'"):
        kernels.select(q, "int4")
    with pytest.raises(UsageError, match="unknown kernel 'gpu'"):
        kernels.select(q, name="gpu")
    with pytest.raises(UsageError, match="does not do"):
        kernels.select(q, name="cpu")


def with_fields(q: QTensor, **fields: torch.Tensor) -> QTensor:
    return QTensor(q.format, q.shape, {**q.fields, **fields})


@pytest.mark.parametrize("act", kernels.ACTS)
@pytest.mark.parametrize("name", ["trellis-1", "trellis-2", "trellis-3", "trellis-4", "int3-g64"])
def test_damaged_bytes_are_other_weights(isa, name, act):
    """Every code and every tile is valid: damage changes values within the range of the format, and nothing else."""
    q = sample(name, 37, 136)
    field = "tiles" if "tiles" in q.fields else "codes"
    noise = torch.randint(0, 256, q.fields[field].shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    damaged = with_fields(q, **{field: q.fields[field] ^ noise})
    assert not torch.equal(damaged.dequantize(), q.dequantize())
    for m in (1, 2, 9):
        check(damaged, activations(m, 136), act, "cpu" if CORE else None)


def test_the_core_refuses_trellis_codes_it_cannot_decode():
    if CORE is None:
        pytest.skip("no native core in this installation")
    code = read_layout(sample("trellis-2", 4, 8)).spec.code
    CORE.TrellisCode(bits=2, gain=4, columns=code.columns, table=code.table)
    for bits, columns, table in [
        (5, code.columns, code.table),
        (2, code.columns * 2, code.table),
        (2, code.columns, code.table[:-1]),
        (2, code.columns, code.table * 2),
        (2, code.columns, (1,) * 64),
    ]:
        with pytest.raises(ValueError, match="not a trellis code"):
            CORE.TrellisCode(bits=bits, gain=4, columns=columns, table=table)


@pytest.mark.parametrize("name", NATIVE)
def test_what_a_weight_is_comes_back_from_its_text(name):
    """The operator takes it as a string."""
    spec = read_layout(sample(name, 5, 256)).spec
    assert read_spec(write_spec(spec)) == spec
