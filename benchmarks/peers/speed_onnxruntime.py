"""ONNX Runtime's MatMulNBits: 2, 4 and 8 bits, int8 activations inside (accuracy_level 4)."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnxruntime
from common import arguments, copies, median_seconds, missing, report
from onnx import TensorProto, helper

KERNELS = [(2, 64), (4, 128), (8, 128)]


def session(bits: int, group: int, n: int, k: int, threads: int, count: int) -> Any:
    """`count` products of one input, one after the other: a session for each would start as many pools of threads."""
    rng, blocks = np.random.default_rng(0), k // group
    nodes, weights = [], []
    for i in range(count):
        codes = rng.integers(0, 256, (n, blocks, group * bits // 8), dtype=np.uint8)
        scales = rng.random(n * blocks, dtype=np.float32) * 0.01
        weights.append(helper.make_tensor(f"codes{i}", TensorProto.UINT8, codes.shape, codes.tobytes(), raw=True))
        weights.append(helper.make_tensor(f"scales{i}", TensorProto.FLOAT, scales.shape, scales.tobytes(), raw=True))
        inputs, sizes = ["x", f"codes{i}", f"scales{i}"], {"K": k, "N": n, "bits": bits, "block_size": group}
        nodes.append(
            helper.make_node("MatMulNBits", inputs, [f"y{i}"], domain="com.microsoft", accuracy_level=4, **sizes)
        )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])
    y = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["m", n]) for i in range(count)]
    graph = helper.make_graph(nodes, "products", [x], y, weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def main() -> None:
    args = arguments()
    for bits, group in KERNELS:
        name = f"ONNX Runtime MatMulNBits {bits} b g{group}"
        for n, k in args.shapes:
            nbytes = n * k * (bits / 8 + 4 / group)
            count = copies(int(nbytes))
            try:
                made = session(bits, group, n, k, args.threads, count)
            except Exception as error:  # its own exception classes are not public
                missing(name, str(error).splitlines()[0])
                break
            for m in args.rows:
                x = np.random.default_rng(1).standard_normal((m, k), dtype=np.float32)
                once = partial(made.run, None, {"x": x})
                report(name, (n, k), m, median_seconds([once], 512) / count, nbytes)
            del made


if __name__ == "__main__":
    main()
