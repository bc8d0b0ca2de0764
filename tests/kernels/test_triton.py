"""Kernels in Triton, on a device that has it, else in its interpreter (TRITON_INTERPRET=1) on the CPU.

`make test-triton` runs them in an environment that has Triton.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from bitfold import QTensor, quantize_tensor
from bitfold.kernels import fused
from bitfold.system import backend

_REAL = [kind for kind in backend.present() if backend.has_triton(torch.device(kind))]
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (pip install 'bitfold[triton]')", allow_module_level=True)
if not _REAL and not _INTERPRETED:
    pytest.skip("Triton without a device of its own; its interpreter wants TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = torch.device("cpu" if _INTERPRETED else _REAL[0])
INTEGERS = [f"int{b}{zero}{group}" for b in (2, 3, 4, 8) for zero in ("", "-asym") for group in ("", "-g64")]
NAMES = [
    *INTEGERS,
    *(
        "int4-affine-g64",
        "int5",
        "int7-g64",
        "int1",
        "nf4",
        "nf4-dq",
        "fp4",
        "fp8-e4m3",
        "int8-tensor",
        "mxfp4",
        "nvfp4",
    ),
    *("trellis-1", "trellis-2", "trellis-3", "trellis-4"),
]


def there(q: QTensor) -> QTensor:
    return QTensor(q.format, q.shape, {name: field.to(DEVICE) for name, field in q.fields.items()})


def weight(name: str, n: int, k: int) -> QTensor:
    return quantize_tensor(torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)), name)


def product(q: QTensor, x: torch.Tensor, act: str = "float") -> torch.Tensor:
    moved = there(q)
    assert fused.has_kernel(moved)
    return fused.matmul(x.to(DEVICE), fused.prepack(moved, act)).cpu()


@pytest.mark.parametrize("name", NAMES)
def test_products_are_within_the_bound_of_float32_sums(name):
    q = weight(name, 50, 200)
    w = q.dequantize().double()
    for m in (1, 3, 16):
        x = torch.randn(m, 200, generator=torch.Generator().manual_seed(m))
        y = product(q, x).double()
        exact = x.double() @ w.T
        bound = (200 + 8) * 2.0**-24 * (x.double().abs() @ w.abs().T)
        assert ((y - exact).abs() <= bound).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_decodes_to_the_value_of_the_cpu(name):
    """An input of one 1 and zeros takes one column out, exactly."""
    q = weight(name, 37, 80)
    w = q.dequantize()
    for first in range(0, 80, 16):
        x = torch.zeros(16, 80)
        x[torch.arange(16), first + torch.arange(16)] = 1
        assert torch.equal(product(q, x), w[:, first : first + 16].T)


@pytest.mark.parametrize("name", ["int4-asym-g64", "nf4", "trellis-2"])
def test_many_columns_are_shared_out(name):
    q = weight(name, 33, 2100 // 4 * 4)
    x = torch.randn(2, q.shape[1], generator=torch.Generator().manual_seed(1))
    exact = x.double() @ q.dequantize().double().T
    bound = (q.shape[1] + 8) * 2.0**-24 * (x.double().abs() @ q.dequantize().double().abs().T)
    assert ((product(q, x).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int4-g64", "trellis-3"])
def test_narrow_activations_are_taken_as_they_are(name, dtype):
    q, x = weight(name, 40, 128), torch.randn(2, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = x.double() @ q.dequantize().double().T
    bound = (128 + 8) * 2.0**-24 * (x.double().abs() @ q.dequantize().double().abs().T)
    assert ((product(q, x).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("name", ["int8", "trellis-2"])
def test_activations_in_8_bits_are_rounded_as_everywhere(name):
    from bitfold.kernels.reference import reference

    q, x = weight(name, 40, 128), torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    expected = reference.matmul(x, reference.prepack(q, "int8"))
    assert torch.allclose(product(q, x, "int8"), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_more_rows_and_gradients_take_the_plain_route():
    q = weight("int4-g64", 40, 128)
    x = torch.randn(17, 128)
    assert torch.allclose(product(q, x), x @ q.dequantize().T, atol=1e-3)
    x = torch.randn(2, 128, requires_grad=True)
    product(q, x).sum().backward()
    assert torch.allclose(x.grad, q.dequantize().sum(0).expand(2, -1), atol=1e-3)


def test_no_rows_make_no_rows():
    assert product(weight("int4-g64", 40, 128), torch.zeros(0, 128)).shape == (0, 40)


@pytest.mark.parametrize("target", [("cuda", 80, 32), ("hip", "gfx942", 64)])
def test_the_kernels_compile_to_machine_code(target, tmp_path):
    """The interpreter takes more than the compiler does; which needs no device to compile for one."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", _COMPILE, repr(target)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["cubin" if target[0] == "cuda" else "hsaco"] * 3


_COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bitfold.kernels import triton_gemv as g

PLAIN = {"x": "*bf16", "codes": "*u8", "scale": "*bf16", "zero": "*bf16", "points": "*fp32", "out": "*fp32",
         "tiles": "*u8", "values": "*i8", "first_point": "fp32"}
DENSE = dict(ROWS=g._ROWS, COLUMNS=g._COLUMNS)
for kernel, fixed in (
    (g._dense, dict(BITS=3, TABLE=False, ZERO=True, M=1, **DENSE)),
    (g._dense, dict(BITS=4, TABLE=True, ZERO=False, M=16, **DENSE)),
    (g._trellis, dict(BITS=2, WINDOW=12, M=2, COLUMNS=g._COLUMNS)),
):
    signature = {a: "constexpr" if a in fixed else PLAIN.get(a, "i32") for a in kernel.arg_names}
    source = ASTSource(kernel, signature=signature, constexprs=fixed)
    made = triton.compile(source, target=GPUTarget(*eval(sys.argv[1])))
    print(*(kind for kind in ("cubin", "hsaco") if kind in made.asm))
"""


@pytest.mark.parametrize("name", ["ternary", "e8p", "q4_0", "aqlm-1x8", "bf16"])
def test_other_formats_take_the_plain_route(name):
    assert not fused.has_kernel(weight(name, 32, 64))
