"""A synthetic checkpoint in the shapes of an 8B Llama, quantized with calibration under a ceiling of memory.

    python benchmarks/big_checkpoint.py [--layers 32] [--max-memory 6GB] [--nsamples 4] [--seqlen 512] [--divide 1]
        [--folder DIR]

Writes random bfloat16 shards (32 layers: 16 GB) with a small tokenizer, runs `bitfold quantize --method ldlq` under the
ceiling in a process of its own, and prints what that process needed as the kernel counted it. Memory does not depend on
the number of layers, so fewer of them show the same in less time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import tiny_lm

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, KV_HEADS = 4096, 14336, 128256, 32, 8
_SIZES = ("HIDDEN", "INTERMEDIATE", "VOCABULARY", "HEADS", "KV_HEADS")


def config(layers: int) -> dict[str, object]:
    """As Llama 3's 8B model has it."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "dtype": "bfloat16",
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False, "hidden_act": "silu",
    }  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
    """Of one layer."""
    kv = HIDDEN // HEADS * KV_HEADS
    attention = {"q_proj": (HIDDEN, HIDDEN), "k_proj": (kv, HIDDEN), "v_proj": (kv, HIDDEN), "o_proj": (HIDDEN, HIDDEN)}
    mlp = dict.fromkeys(("gate_proj", "up_proj"), (INTERMEDIATE, HIDDEN)) | {"down_proj": (HIDDEN, INTERMEDIATE)}
    found: dict[str, tuple[int, ...]] = {f"self_attn.{name}.weight": shape for name, shape in attention.items()}
    found |= {f"mlp.{name}.weight": shape for name, shape in mlp.items()}
    return found | {f"{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}


def make(folder: Path, layers: int) -> int:
    """Write the checkpoint, a shard a layer; its bytes."""
    folder.mkdir(parents=True)
    tiny_lm.tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config(layers)))
    (folder / "text.txt").write_text(tiny_lm.TEXT * 20, encoding="utf-8")
    generator, weight_map = torch.Generator().manual_seed(0), {}

    def shard(name: str, wanted: dict[str, tuple[int, ...]]) -> None:
        def random(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.ones(shape).bfloat16() if len(shape) == 1 else _noise(shape, generator)

        save_file({tensor: random(shape) for tensor, shape in wanted.items()}, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(wanted, name))

    shard("ends.safetensors", {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)})
    shard("head.safetensors", {"lm_head.weight": (VOCABULARY, HIDDEN)})
    for i in range(layers):
        shard(f"layer-{i:02d}.safetensors", {f"model.layers.{i}.{name}": shape for name, shape in shapes().items()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    out = torch.empty(shape, dtype=torch.bfloat16)
    for rows in out.split(4096):
        rows.copy_(torch.randn(rows.shape, generator=generator) * 0.02)
    return out


def main() -> int:
    """Make, quantize, measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--max-memory", default="6GB")
    parser.add_argument("--nsamples", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--divide", type=int, default=1, help="all sizes by this, for slower machines")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    globals().update({name: globals()[name] // options.divide for name in _SIZES})
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source, out = Path(name) / "source", Path(name) / "out"
        size = make(source, options.layers)
        print(f"{options.layers} layers, {size / 1e9:.2f} GB of bfloat16", flush=True)
        command = [sys.executable, "-m", "bitfold", "quantize", str(source), "-o", str(out), "--format", "int4-g128"]
        command += ["--method", "ldlq", "--max-memory", options.max_memory, "--calibration", str(source / "text.txt")]
        command += ["--nsamples", str(options.nsamples), "--seqlen", str(options.seqlen), "--no-fisher", "--json"]
        started = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        seconds = time.perf_counter() - started
        if done.returncode:
            return done.returncode
        report = json.loads(done.stdout)
    facts = {key: report[key] for key in ("peak_memory", "max_memory", "bytes_before", "bytes_after", "bpw_quantized")}
    facts["estimated"] = report["preflight"]["peak_memory"]
    print(json.dumps({"layers": options.layers, "seconds": round(seconds, 1), **facts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
