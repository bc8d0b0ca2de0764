"""llama.cpp's products (ggml), through the libraries that llama-cpp-python builds.

One graph multiplies all copies one after the other, as a model's layers do: its threads are started once a graph.
Types that llama.cpp stores in another order when it loads a model ("repacked") are measured that way, too.
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
REPACKED = ("Q4_0", "Q4_K", "Q2_K")  # ggml-cpu/repack.cpp, with AVX2 or AVX-512
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
        ("ggml_backend_cpu_reg", c_void_p),
        ("ggml_backend_reg_dev_get", c_void_p, c_void_p, c_size_t),
        ("ggml_backend_reg_get_proc_address", c_void_p, c_void_p, c_char_p),
        ("ggml_backend_buft_name", c_char_p, c_void_p),
        ("ggml_backend_alloc_ctx_tensors_from_buft", c_void_p, c_void_p, c_void_p),
        ("ggml_backend_buffer_free", None, c_void_p),
        ("ggml_backend_tensor_set", None, c_void_p, c_void_p, c_size_t, c_size_t),
    ):
        function = getattr(ggml, name)
        function.restype, function.argtypes = result, list(given)


def measure(
    ggml: ctypes.CDLL, name: str, shape: tuple[int, int], rows: list[int], threads: int, buffers: int | None = None
) -> None:
    """`buffers`: the type of buffer that repacks; without, weights lie in memory as they are in a file."""
    (n, k), kind = shape, TYPES[name]
    nbytes = ggml.ggml_row_size(kind, k) * n
    count = copies(nbytes)
    weights_context = ggml.ggml_init(
        InitParams(count * (nbytes + 4096) if buffers is None else 1 << 22, None, bool(buffers))
    )
    weights = [ggml.ggml_new_tensor_2d(weights_context, kind, k, n) for _ in range(count)]
    buffer = buffers and ggml.ggml_backend_alloc_ctx_tensors_from_buft(weights_context, buffers)
    fill(ggml, kind, weights, n, k, nbytes, repack=bool(buffers))
    for m in rows:
        context = ggml.ggml_init(InitParams(m * (k + count * n) * 4 * 3 + (64 << 20), None, False))
        x = ggml.ggml_new_tensor_2d(context, F32, k, m)
        values = np.random.default_rng(0).standard_normal(m * k, dtype=np.float32)
        ctypes.memmove(ggml.ggml_get_data(x), values.ctypes.data, values.nbytes)
        used = weights if m <= 64 else weights[:2]
        graph = ggml.ggml_new_graph_custom(context, 4 * len(used) + 16, False)
        for w in used:
            ggml.ggml_build_forward_expand(graph, ggml.ggml_mul_mat(context, w, x))
        once = partial(ggml.ggml_graph_compute_with_ctx, context, graph, threads)
        seconds = median_seconds([once], 512)
        report(f"llama.cpp {name}{', repacked' if buffers else ''}", shape, m, seconds / len(used), nbytes)
        ggml.ggml_free(context)
    if buffer:
        ggml.ggml_backend_buffer_free(buffer)
    ggml.ggml_free(weights_context)


def fill(ggml: ctypes.CDLL, kind: int, weights: list[int], n: int, k: int, nbytes: int, *, repack: bool) -> None:
    """Real blocks: random bytes could be infinite scales."""
    source = np.random.default_rng(1).standard_normal((n, k), dtype=np.float32)
    blocks = np.empty(nbytes, dtype=np.uint8)
    ggml.ggml_quantize_chunk(kind, source.ctypes.data_as(ctypes.POINTER(c_float)), blocks.ctypes.data, 0, n, k, None)
    for w in weights:
        if repack:
            ggml.ggml_backend_tensor_set(w, blocks.ctypes.data, 0, nbytes)
        else:
            ctypes.memmove(ggml.ggml_get_data(w), blocks.ctypes.data, nbytes)


def repacking_buffers(ggml: ctypes.CDLL) -> int | None:
    """The type of buffer that llama.cpp loads such weights into, if this build has it."""
    registry = ggml.ggml_backend_cpu_reg()
    address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return None
    extra = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)
    types = extra(ggml.ggml_backend_reg_dev_get(registry, 0))
    for at in range(16):
        if not types[at]:
            return None
        if b"REPACK" in ggml.ggml_backend_buft_name(types[at]):
            return types[at]
    return None


def main() -> None:
    args, ggml = arguments(), libraries()
    try:
        declare(ggml)
    except AttributeError as error:
        missing("llama.cpp", f"its libraries do not export {error}")
        return
    ggml.ggml_cpu_init()
    for name in TYPES:
        for shape in args.shapes:
            measure(ggml, name, shape, args.rows, args.threads)
    buffers = repacking_buffers(ggml)
    if buffers is None:
        missing("llama.cpp, repacked", "this build has no such buffers")
        return
    for name in REPACKED:
        for shape in args.shapes:
            measure(ggml, name, shape, args.rows, args.threads, buffers)


if __name__ == "__main__":
    main()
