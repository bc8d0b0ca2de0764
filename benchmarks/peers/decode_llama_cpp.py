"""llama.cpp reads a prompt and writes tokens, through its C API as llama-cpp-python binds it: no Python in a token.

python decode_llama_cpp.py FILE.gguf [--threads 2] [--prompt 512] [--tokens 64] [--turns 3]
python decode_llama_cpp.py FILE.gguf --write TYPE=OTHER.gguf  # the same model in another type
"""

from __future__ import annotations

import argparse
import ctypes
import random
import statistics
import sys
import time

import llama_cpp as lib
from common import speeds


def context(path: str, threads: int, positions: int) -> tuple[object, object]:
    """A model as llama.cpp loads it by default (mapped, repacked where it repacks), and its context."""
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    if not model:
        sys.exit(f"llama.cpp cannot load {path}")
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = positions, 512, 512
    params.n_threads = params.n_threads_batch = threads
    return model, lib.llama_init_from_model(model, params)


def decode(made: object, ids: list[int]) -> float:
    """Seconds for these tokens, logits of the last included."""
    data = (lib.llama_token * len(ids))(*ids)
    start = time.perf_counter()
    if lib.llama_decode(made, lib.llama_batch_get_one(data, len(ids))):
        sys.exit("llama_decode failed")
    lib.llama_get_logits_ith(made, -1)
    return time.perf_counter() - start


def best_token(made: object, vocabulary: int) -> int:
    """Of the last logits."""
    logits = lib.llama_get_logits_ith(made, -1)
    values = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * vocabulary)).contents
    return max(range(vocabulary), key=values.__getitem__)


def measure(path: str, threads: int, prompt: int, tokens: int, turns: int) -> None:
    """One JSON line."""
    model, made = context(path, threads, prompt + tokens)
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    draw = random.Random(0)
    ids = [draw.randrange(vocabulary) for _ in range(prompt)]
    decode(made, ids[:8])
    first, steps = [], []
    for _ in range(turns):
        lib.llama_memory_clear(lib.llama_get_memory(made), True)
        first.append(decode(made, ids))
        token = best_token(made, vocabulary)
        for _ in range(tokens - 1):
            steps.append(decode(made, [token]))
            token = draw.randrange(vocabulary)  # any will do: what is timed does not depend on it
    speeds(prompt / statistics.median(first), 1 / statistics.median(steps), lib.llama_model_size(model))


def write(path: str, wanted: str) -> None:
    """Quantize a file into TYPE=OTHER.gguf."""
    kind, target = wanted.split("=", 1)
    params = lib.llama_model_quantize_default_params()
    params.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.allow_requantize = True
    if lib.llama_model_quantize(path.encode(), target.encode(), params):
        sys.exit(f"llama.cpp cannot write {kind}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--write")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    quiet = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(quiet, None)
    lib.llama_backend_init()
    if args.write:
        write(args.file, args.write)
    else:
        measure(args.file, args.threads, args.prompt, args.tokens, args.turns)


if __name__ == "__main__":
    main()
