"""A synthetic checkpoint in the shapes of an 8B Llama, quantized with calibration under a ceiling of memory.

    python benchmarks/big_checkpoint.py [--layers 32] [--max-memory 6GB] [--method gptq] [--nsamples 7] [--seqlen 512]
        [--divide 1] [--folder DIR]

Writes random bfloat16 shards (32 layers: 16 GB) with a small tokenizer, runs `bitfold quantize` under the ceiling in a
process of its own, and prints what that process needed as the kernel counted it. 7 x 512 tokens are a quarter of the
14336 inputs of the widest layer: with fewer it would be quantized without data. Memory does not depend on the number
of layers, so fewer of them show the same in less time. With --folder a run that was stopped is gone on with.
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
    if (folder / "model.safetensors.index.json").is_file():
        return sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    folder.mkdir(parents=True, exist_ok=True)
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
    """Rows out of one long list of random numbers, each from a place and with a sign of its own."""
    if not _NUMBERS:
        _NUMBERS.append((torch.randn(1 << 22, generator=generator) * 0.02).bfloat16())
    numbers = _NUMBERS[0]
    places = torch.randint(len(numbers) - shape[1], (shape[0],), generator=generator).tolist()
    signs = (torch.randint(2, (shape[0], 1), generator=generator) * 2 - 1).bfloat16()
    return torch.stack([numbers[at : at + shape[1]] for at in places]).mul_(signs)


_NUMBERS: list[torch.Tensor] = []


def command(source: Path, out: Path, options: argparse.Namespace) -> list[str]:
    """What a user would type."""
    made = [sys.executable, "-m", "bitfold", "quantize", str(source), "-o", str(out), "--format", "int4-g128"]
    made += ["--method", options.method, "--max-memory", options.max_memory, "--fit", "absmax", "--no-fisher"]
    made += ["--calibration", str(source / "text.txt"), "--nsamples", str(options.nsamples)]
    return [*made, "--seqlen", str(options.seqlen), "--events", str(out) + ".events.jsonl", "--json"]


def main() -> int:
    """Make, quantize, measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--max-memory", default="6GB")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--nsamples", type=int, default=7)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--divide", type=int, default=1, help="all sizes by this, for slower machines")
    parser.add_argument("--folder", type=Path, help="where source and result stay; default: removed at the end")
    options = parser.parse_args()
    globals().update({name: globals()[name] // options.divide for name in _SIZES})
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        source, out = folder / "source", folder / "out"
        size = make(source, options.layers)
        print(f"{options.layers} layers, {size / 1e9:.2f} GB of bfloat16", flush=True)
        started = time.perf_counter()
        done = subprocess.run(command(source, out, options), stdout=subprocess.PIPE, text=True, check=False)
        seconds = time.perf_counter() - started
        if done.returncode:
            return done.returncode
        report = json.loads(done.stdout)
    facts = {key: report[key] for key in ("peak_memory", "max_memory", "bytes_before", "bytes_after", "bpw_quantized")}
    facts |= {key: report["preflight"][key] for key in ("columns", "seconds")}
    facts["estimated"] = report["preflight"]["peak_memory"]
    facts["without_data"] = sum("without data" in flag for t in report["tensors"] for flag in t["flags"])
    print(json.dumps({"layers": options.layers, "took": round(seconds, 1), **facts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
