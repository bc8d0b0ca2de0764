"""Small sound inputs of every reader, from which fuzzing starts."""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save, save_file

from bitfold.checkpoints.gguf.imatrix import Imatrix, Importance, write_imatrix
from bitfold.checkpoints.manifest import FILE as MANIFEST
from bitfold.checkpoints.manifest import write_manifest
from bitfold.checkpoints.schema import QUANT_METHOD, VERSION
from bitfold.formats import get_format
from bitfold.methods.quantize import quantize_tensor
from bitfold.transforms import Hadamard

sys.path.append(str(Path(__file__).parent.parent / "tests"))  # gguf_files
FORMATS = ("int4-asym-g32", "nf4-dq", "int3", "mxfp4", "nvfp4", "ternary", "trellis-2", "q4_k", "int1-g32")
RECIPE = b"""[[rule]]
match = "re:.*down_proj"
format = "int8"

[[rule]]
match = "*"
format = "int4-asym-g64"
fit = "mse"
method = "ldlq"
transform = "hadamard"
"""


@cache
def shard() -> bytes:
    """A safetensors file of three tensors."""
    return save({"a": torch.zeros(3, 4), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.zeros(0)})


def quantized_folder(folder: Path) -> bytes:
    """Write tensors in many formats and their config; returns the config."""
    tensors, entries, formats = {}, {}, {}
    for i, name in enumerate(FORMATS):
        format = get_format(name)
        q = quantize_tensor(torch.randn(4, 256, generator=torch.Generator().manual_seed(i)), format)
        tensors |= {f"t{i}.weight.{field}": value for field, value in q.fields.items()}
        formats[name] = format.describe()
        entries[f"t{i}.weight"] = {"format": name, "shape": [4, 256]}
    entries["t0.weight"]["transform"] = Hadamard(256, 3).describe()
    entries["t2.weight"]["transposed"] = True
    save_file(tensors, folder / "model.safetensors")
    quantization = {
        "quant_method": QUANT_METHOD, "version": VERSION, "formats": formats, "tensors": entries,
        "kept": {}, "unused": [], "recipe": [],
    }  # fmt: skip
    text = json.dumps({"model_type": "llama", "quantization_config": quantization})
    (folder / "config.json").write_text(text)
    return text.encode()


@cache
def gguf_file() -> bytes:
    """A one-layer Llama with a small BPE tokenizer."""
    from gguf_files import LLAMA, llama_tensors, write_gguf

    symbols = [chr(c) for c in range(33, 79)]
    metadata = {
        **LLAMA,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<end>", *symbols, '!"'],
        "tokenizer.ggml.token_type": [3] + [1] * 47,
        "tokenizer.ggml.merges": ['! "'],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }
    types = {"blk.0.attn_q.weight": "q4_1", "blk.0.ffn_up.weight": "q8_0", "blk.0.ffn_down.weight": "f16"}
    with tempfile.TemporaryDirectory() as folder:
        return write_gguf(Path(folder) / "m.gguf", "llama", llama_tensors(), metadata, types).read_bytes()


@cache
def importance_matrices() -> list[bytes]:
    """Both forms."""
    entries = {"blk.0.ffn_up.weight": Importance(torch.ones(8), torch.ones(8)), "a": Importance(torch.ones(2, 4))}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("m.gguf", "m.dat")]
        for file in files:
            write_imatrix(file, Imatrix(entries, 1024, 512, ("text",)))
        return [file.read_bytes() for file in files]


def seeds(name: str) -> list[bytes]:
    """Starting inputs of a target."""
    if name == "header":
        tricky = b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,0]}}'
        return [shard(), struct.pack("<Q", len(tricky)) + tricky, struct.pack("<Q", 2) + b"{}"]
    if name == "index":
        good = {"metadata": {"total_size": 58}, "weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}
        escape = {"weight_map": {"a": "..\\a.safetensors", "b": "/etc/a.safetensors"}}
        return [json.dumps(good).encode(), json.dumps(escape).encode()]
    if name == "config":
        with tempfile.TemporaryDirectory() as folder:
            return [quantized_folder(Path(folder))]
    if name == "gguf":
        return [gguf_file()]
    if name == "imatrix":
        return importance_matrices()
    if name == "manifest":
        with tempfile.TemporaryDirectory() as folder:
            quantized_folder(Path(folder))
            totals = {"all": {"tensors": 9, "bytes": 99}, "quantized": {"tensors": 9, "bytes": 99}}
            write_manifest(Path(folder), totals)
            return [(Path(folder) / MANIFEST).read_bytes()]
    if name == "text":
        return [b'{"text": "one line"}\n{"text": "and another", "more": [1, {"a": null}]}\n']
    return [RECIPE]
