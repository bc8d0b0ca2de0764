"""llama.cpp's products (ggml), through the libraries that llama-cpp-python builds.

One graph multiplies all copies one after the other, as a model's layers do: its threads are started once a graph.
"""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import partial
from pathlib import Path

import llama_cpp
import numpy as np
from common import arguments, copies, median_seconds, missing, report

TYPES = {"Q8_0": 8, "Q4_0": 2, "Q4_K": 12, "Q3_K": 11, "Q2_K": 10, "IQ4_XS": 23}  # ggml.h, enum ggml_type
F32 = 0


class InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


def libraries() -> ctypes.CDLL:
    """ggml's functions, from whichever of its libraries exports them."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    for stem in ("ggml-base", "ggml-cpu", "ggml"):
        for file in folder.glob(f"*{stem}.*"):
            ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(None)


def declare(ggml: ctypes.CDLL) -> None:
    """Types of what is called."""
    for name, result, *given in (
        ("ggml_init", c_void_p, InitParams),
        ("ggml_free", None, c_void_p),
        ("ggml_new_tensor_2d", c_void_p, c_void_p, c_int, c_int64, c_int64),
        ("ggml_get_data", c_void_p, c_void_p),
        ("ggml_row_size", c_size_t, c_int, c_int64),
        ("ggml_mul_mat", c_void_p, c_void_p, c_void_p, c_void_p),
        ("ggml_new_graph_custom", c_void_p, c_void_p, c_size_t, c_bool),
        ("ggml_build_forward_expand", None, c_void_p, c_void_p),
        ("ggml_graph_compute_with_ctx", c_int, c_void_p, c_void_p, c_int),
        ("ggml_quantize_chunk", c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
        ("ggml_type_name", c_char_p, c_int),
        ("ggml_cpu_init", None),
    ):
        function = getattr(ggml, name)
        function.restype, function.argtypes = result, list(given)


def measure(ggml: ctypes.CDLL, kind: int, shape: tuple[int, int], rows: list[int], threads: int, name: str) -> None:
    n, k = shape
    nbytes = ggml.ggml_row_size(kind, k) * n
    count = copies(nbytes)
    room = count * (nbytes + 4096) + sum(rows) * (k + count * n) * 4 * 3 + (64 << 20)
    for m in rows:
        context = ggml.ggml_init(InitParams(room, None, False))
        weights = [ggml.ggml_new_tensor_2d(context, kind, k, n) for _ in range(count)]
        fill(ggml, kind, weights, n, k, nbytes)
        x = ggml.ggml_new_tensor_2d(context, F32, k, m)
        values = np.random.default_rng(0).standard_normal(m * k, dtype=np.float32)
        ctypes.memmove(ggml.ggml_get_data(x), values.ctypes.data, values.nbytes)
        used = weights if m <= 64 else weights[:2]
        graph = ggml.ggml_new_graph_custom(context, 4 * len(used) + 16, False)
        for w in used:
            ggml.ggml_build_forward_expand(graph, ggml.ggml_mul_mat(context, w, x))
        once = partial(ggml.ggml_graph_compute_with_ctx, context, graph, threads)
        seconds = median_seconds([once], 512)
        report(name, shape, m, seconds / len(used), nbytes)
        ggml.ggml_free(context)


def fill(ggml: ctypes.CDLL, kind: int, weights: list[int], n: int, k: int, nbytes: int) -> None:
    """Real blocks: random bytes could be infinite scales."""
    source = np.random.default_rng(1).standard_normal((n, k), dtype=np.float32)
    first = ggml.ggml_get_data(weights[0])
    ggml.ggml_quantize_chunk(kind, source.ctypes.data_as(ctypes.POINTER(c_float)), first, 0, n, k, None)
    for w in weights[1:]:
        ctypes.memmove(ggml.ggml_get_data(w), first, nbytes)


def main() -> None:
    args, ggml = arguments(), libraries()
    try:
        declare(ggml)
    except AttributeError as error:
        missing("llama.cpp", f"its libraries do not export {error}")
        return
    ggml.ggml_cpu_init()
    for name, kind in TYPES.items():
        for shape in args.shapes:
            measure(ggml, kind, shape, args.rows, args.threads, f"llama.cpp {name}")


if __name__ == "__main__":
    main()
