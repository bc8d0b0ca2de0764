"""Peak memory of judging a model against a reference of the same size, beside the memory of one of them.

    python benchmarks/bench_eval_memory.py [--layers 16] [--tokens 1024] [--context 512] [--bits 4] [--dtype float32]

Makes two bfloat16 checkpoints of random weights in the shape of Llama-3.2-1B (1.24 billion parameters, tied output
head, vocabulary 128256), evaluates one against the other in a process of its own, and prints the peak resident memory,
and that over an interpreter that has only imported the libraries, divided by the bytes of one model in the dtype that
is computed in. With --bits the model judged is the second one, rounded to so many bits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path

import torch

from bitfold import quantize
from bitfold.checkpoints.targets import SafetensorsFolder
from bitfold.system.tensorinfo import TensorInfo

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, KEYS = 2048, 8192, 128256, 32, 8

STEP = """
import json, sys, torch, transformers
import bitfold.evaluation.fidelity as fidelity, bitfold.engine
from transformers import LlamaForCausalLM
from bitfold.records.run_report import peak_memory
ids = torch.randint(0, 128256, (int(sys.argv[3]),), generator=torch.Generator().manual_seed(0))
class Tokenizer:
    def __call__(self, *args, **kwargs):
        return {"input_ids": ids.tolist()}
before = peak_memory()
result = fidelity.evaluate(sys.argv[1], sys.argv[2], "random ids" * 200, context=int(sys.argv[4]), max_tokens=None,
                           tokenizer=Tokenizer(), dtype=sys.argv[5])
print(json.dumps([before, peak_memory(), result.kl_mean, result.seconds]))
"""


def make(folder: Path, layers: int, seed: int) -> int:
    """Write a checkpoint; returns the number of its weights."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    narrow = HIDDEN // HEADS * KEYS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        at = f"model.layers.{i}"
        rows = (("q", HIDDEN), ("k", narrow), ("v", narrow), ("o", HIDDEN))
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (n, HIDDEN) for name, n in rows}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes |= {f"{at}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (HIDDEN,)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "dtype": "bfloat16"}
    config |= {"intermediate_size": INTERMEDIATE, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": KEYS, "tie_word_embeddings": True}
    target = SafetensorsFolder(folder, 1 << 30)
    target.layout({name: TensorInfo(torch.bfloat16, shape) for name, shape in shapes.items()})
    for name, shape in shapes.items():
        target.write(name, [(torch.randn(*shape, generator=generator) * 0.02).bfloat16()])
    target.finish(config)
    return sum(prod(shape) for shape in shapes.values())


def main() -> None:
    """Make, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--bits", type=int, help="judge the reference rounded to so many bits, not another model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / name for name in ("model", "reference")]
        weights = make(folders[1], options.layers, 1)
        if options.bits is None:
            make(folders[0], options.layers, 0)
        else:
            quantize(folders[1], folders[0], bits=options.bits, method="rtn", fit="minmax")
        packed = sum(file.stat().st_size for file in folders[0].glob("*.safetensors"))
        arguments = [*map(str, folders), str(options.tokens), str(options.context), options.dtype]
        done = subprocess.run([sys.executable, "-c", STEP, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    before, after, kl, seconds = json.loads(done.stdout.splitlines()[-1])
    one = weights * (4 if options.dtype == "float32" else 2)
    print(f"one model: {weights / 1e9:.2f} billion weights, {one / 1e6:.0f} MB in {options.dtype}")
    print(f"the model judged: {packed / 1e6:.0f} MB on disk; KL {kl:.4f}, {seconds:.0f} s")
    print(f"peak {after / 1e6:.0f} MB, {after / one:.3f} times one model")
    print(f"without the {before / 1e6:.0f} MB of interpreter and libraries: {(after - before) / one:.3f} times")


if __name__ == "__main__":
    main()
