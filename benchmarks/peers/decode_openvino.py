"""OpenVINO GenAI reads a prompt and writes tokens: a GGUF file as it reads it, or a folder that Optimum has exported.

python decode_openvino.py MODEL [--threads 2] [--prompt 512] [--tokens 64] [--turns 3]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
import openvino
import openvino_genai as genai
from common import speeds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    made = genai.LLMPipeline(
        args.model, "CPU", INFERENCE_NUM_THREADS=args.threads, ENABLE_CPU_PINNING=False, PERFORMANCE_HINT="LATENCY"
    )
    draw = np.random.default_rng(0)
    config = genai.GenerationConfig(max_new_tokens=args.tokens, ignore_eos=True, do_sample=False)
    mask = openvino.Tensor(np.ones((1, args.prompt), dtype=np.int64))
    first, steps = [], []
    for turn in range(args.turns + 1):
        ids = draw.integers(0, 1000, (1, args.prompt), dtype=np.int64)  # others each time: it remembers prompts
        found = made.generate(genai.TokenizedInputs(openvino.Tensor(ids), mask), config).perf_metrics
        if turn:
            first.append(found.get_ttft().mean / 1e3)
            steps.append(found.get_tpot().mean / 1e3)
    speeds(args.prompt / statistics.median(first), 1 / statistics.median(steps), size(Path(args.model)))


def size(model: Path) -> int:
    """Bytes on disk."""
    return model.stat().st_size if model.is_file() else sum(f.stat().st_size for f in model.glob("*.bin"))


if __name__ == "__main__":
    main()
