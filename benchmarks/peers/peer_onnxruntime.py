"""ONNX Runtime's MatMulNBits: 2, 4 and 8 bits, int8 activations inside (accuracy_level 4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from common import arguments, copies, median_seconds, missing, report
from onnx import TensorProto, helper

KERNELS = [(2, 64), (4, 128), (8, 128)]


def session(bits: int, group: int, n: int, k: int, threads: int, rng: np.random.Generator) -> Any:
    """One product with weights of its own."""
    blocks = k // group
    codes = rng.integers(0, 256, (n, blocks, group * bits // 8), dtype=np.uint8)
    scales = rng.random(n * blocks, dtype=np.float32) * 0.01
    weights = [
        helper.make_tensor("codes", TensorProto.UINT8, codes.shape, codes.tobytes(), raw=True),
        helper.make_tensor("scales", TensorProto.FLOAT, scales.shape, scales.tobytes(), raw=True),
    ]
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=bits,
        block_size=group,
        accuracy_level=4,
    )
    x, y = (helper.make_tensor_value_info(v, TensorProto.FLOAT, ["m", d]) for v, d in (("x", k), ("y", n)))
    graph = helper.make_graph([node], "one", [x], [y], weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def main() -> None:
    args, rng = arguments(), np.random.default_rng(0)
    for bits, group in KERNELS:
        name = f"ONNX Runtime MatMulNBits {bits} b g{group}"
        for n, k in args.shapes:
            nbytes = n * k * (bits / 8 + 4 / group)
            try:
                made = [session(bits, group, n, k, args.threads, rng) for _ in range(copies(int(nbytes)))]
            except Exception as error:  # its own exception classes are not public
                missing(name, str(error).splitlines()[0])
                break
            for m in args.rows:
                x = rng.standard_normal((m, k), dtype=np.float32)
                calls = [lambda s=s, x=x: s.run(None, {"x": x}) for s in made]
                report(name, (n, k), m, median_seconds(calls, m), nbytes)


if __name__ == "__main__":
    main()
