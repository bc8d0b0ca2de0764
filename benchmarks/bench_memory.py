"""Peak memory of quantizing and of loading a synthetic checkpoint, each in a process of its own.

    python benchmarks/bench_memory.py [--gigabytes 2] [--bits 8]

Makes a Llama-shaped bfloat16 checkpoint of random weights (deterministic), quantizes it, loads it, and prints the peak
resident memory of each step beside that of an interpreter that has only imported the libraries.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bitfold.checkpoints.targets import SafetensorsFolder
from bitfold.system.tensorinfo import TensorInfo

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS = 2048, 8192, 32000, 32

STEP = """
import json, sys, torch, bitfold, transformers
import bitfold.run.driver, bitfold.models.load
from transformers import LlamaForCausalLM
from bitfold.records.run_report import peak_memory
before = peak_memory()
if sys.argv[1] == "quantize":
    bitfold.quantize(sys.argv[2], sys.argv[3], bits=int(sys.argv[4]), fit="absmax")
else:
    for tensor in bitfold.load(sys.argv[3]).state_dict().values():
        tensor.reshape(-1).view(torch.uint8)[::1024].max()  # bring in every page of the file
print(json.dumps([before, peak_memory()]))
"""


def make(folder: Path, gigabytes: float) -> None:
    """Write a checkpoint of about that size."""
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN, HIDDEN),
        "self_attn.v_proj": (HIDDEN, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    per_layer = 2 * sum(n * k for n, k in layer.values())
    layers = max(1, round((gigabytes * 1e9 - 2 * VOCABULARY * HIDDEN) / per_layer))
    folder.mkdir(parents=True)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        shapes |= {f"model.layers.{i}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (HIDDEN,)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "dtype": "bfloat16"}
    config |= {"intermediate_size": INTERMEDIATE, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    config |= {"num_attention_heads": HEADS, "tie_word_embeddings": True}
    target, generator = SafetensorsFolder(folder, 1 << 29), torch.Generator().manual_seed(0)
    target.layout({name: TensorInfo(torch.bfloat16, shape) for name, shape in shapes.items()})
    for name, shape in shapes.items():
        target.write(name, [(torch.randn(*shape, generator=generator) * 0.02).bfloat16()])
    target.finish(config)


def measure(step: str, source: Path, out: Path, bits: int) -> tuple[int, int]:
    """Peak of a fresh process before and after the step."""
    command = [sys.executable, "-c", STEP, step, str(source), str(out), str(bits)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    before, after = json.loads(done.stdout.splitlines()[-1])
    return before, after


def size(folder: Path) -> int:
    """Bytes of the weights of a folder."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def main() -> None:
    """Make, quantize, load; print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--bits", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        source, out = Path(temporary) / "source", Path(temporary) / "out"
        make(source, options.gigabytes)
        print(f"source {size(source) / 1e6:.0f} MB")
        for step in ("quantize", "load"):
            before, after = measure(step, source, out, options.bits)
            extra = (after - before) / size(out)
            print(
                f"{step}: peak {after / 1e6:.0f} MB, {before / 1e6:.0f} MB of it the interpreter and its libraries; ",
                end="",
            )
            print(f"the rest is {extra:.2f} times the folder written ({size(out) / 1e6:.0f} MB)")


if __name__ == "__main__":
    main()
