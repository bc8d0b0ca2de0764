"""OpenVINO: compressed weights (u4 in groups of 128, u8 a row), float32 with dynamic int8 activations."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
from common import arguments, copies, median_seconds, report
from openvino import opset13 as ops

GROUP = 128
_ALIVE: list[np.ndarray] = []
KERNELS = {"u4 g128": ("u4", GROUP), "u8": ("u8", 0)}


def compiled(kind: str, group: int, n: int, k: int, threads: int, rng: np.random.Generator) -> Any:
    """One product with weights of its own."""
    shape = (n, k // group, group) if group else (n, k)
    scale_shape = (n, k // group, 1) if group else (n, 1)
    element = openvino.Type.u4 if kind == "u4" else openvino.Type.u8
    stored = n * k // 2 if kind == "u4" else n * k
    data = rng.integers(0, 256, stored, dtype=np.uint8)
    _ALIVE.append(data)  # the tensor below refers to it
    codes = openvino.Tensor(data, openvino.Shape(shape), element)
    middle = 8 if kind == "u4" else 128
    w = ops.convert(openvino.op.Constant(codes), np.float32)
    zero = ops.convert(ops.constant(np.full((1,), middle, np.uint8)), np.float32)
    w = ops.multiply(ops.subtract(w, zero), ops.constant(rng.random(scale_shape, dtype=np.float32) * 0.01))
    if group:
        w = ops.reshape(w, np.array([n, k]), special_zero=False)
    x = ops.parameter([-1, k], np.float32)
    model = openvino.Model([ops.matmul(x, w, False, True)], [x])
    hints = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group or 128),
        "ENABLE_CPU_PINNING": False,  # pinned, it uses one of two cores on some machines
        "PERFORMANCE_HINT": "LATENCY",
    }
    return openvino.Core().compile_model(model, "CPU", hints)


def main() -> None:
    args, rng = arguments(), np.random.default_rng(0)
    for name, (kind, group) in KERNELS.items():
        for n, k in args.shapes:
            nbytes = n * k * ((0.5 if kind == "u4" else 1.0) + (4 / group if group else 4 / k))
            made = [compiled(kind, group, n, k, args.threads, rng) for _ in range(copies(int(nbytes)))]
            for m in args.rows:
                x = rng.standard_normal((m, k), dtype=np.float32)
                calls = [lambda r=r, x=x: r([x], share_inputs=True) for r in made]
                report(f"OpenVINO {name}", (n, k), m, median_seconds(calls, m), nbytes)


if __name__ == "__main__":
    main()
