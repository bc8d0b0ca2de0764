"""A GGUF file of a known shape with random blocks, so that llama.cpp's speed can be measured without a download.

    python benchmarks/random_gguf.py llama-1b Q4_0 FILE.gguf

Only the scales of a block are set (random bytes could be infinite), the rest are any bits. The output head, tied as in
the model of that shape, has the type that llama.cpp's quantizer gives it: Q8_0 beside Q8_0, Q5_K beside IQ2_XXS and its
like, else Q6_K. There is no vocabulary, only its size.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

from bitfold.engine.shapes import SHAPES

# Where a block has its float16 scales.
SCALES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ2_XXS": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}


def blocks(kind: str, rows: int, columns: int) -> np.ndarray:
    """Bytes (rows, bytes of a row)."""
    weights, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    draw = np.random.default_rng(rows + columns)
    made = draw.integers(0, 256, (rows * columns // weights, nbytes), dtype=np.uint8)
    for at in SCALES[kind]:
        made[:, at : at + 2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
    return made.reshape(rows, -1)


def head_type(kind: str) -> str:
    return {"Q8_0": "Q8_0", "IQ2_XXS": "Q5_K"}.get(kind, "Q6_K")


def write(shape: str, kind: str, target: Path) -> None:
    """A whole file."""
    config = SHAPES[shape]
    hidden, ffn, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, kv, vocabulary = config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"]
    dim = config.get("head_dim", hidden // heads)
    out = GGUFWriter(target, "llama")
    out.add_block_count(layers)
    out.add_context_length(32768)
    out.add_embedding_length(hidden)
    out.add_feed_forward_length(ffn)
    out.add_head_count(heads)
    out.add_head_count_kv(kv)
    out.add_key_length(dim)
    out.add_value_length(dim)
    out.add_rope_dimension_count(dim)
    out.add_rope_freq_base(10000.0)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(vocabulary)
    out.add_tokenizer_model("no_vocab")

    def matrix(name: str, rows: int, columns: int, chosen: str = kind) -> None:
        out.add_tensor(f"{name}.weight", blocks(chosen, rows, columns), raw_dtype=GGMLQuantizationType[chosen])

    matrix("token_embd", vocabulary, hidden, head_type(kind))
    if not config["tie_word_embeddings"]:
        matrix("output", vocabulary, hidden, head_type(kind))
    ones = np.ones(hidden, dtype=np.float32)
    out.add_tensor("output_norm.weight", ones)
    for i in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            out.add_tensor(f"blk.{i}.{name}.weight", ones)
        for name, rows in (("q", heads * dim), ("k", kv * dim), ("v", kv * dim)):
            matrix(f"blk.{i}.attn_{name}", rows, hidden)
        matrix(f"blk.{i}.attn_output", hidden, heads * dim)
        for name, rows, columns in (("gate", ffn, hidden), ("up", ffn, hidden), ("down", hidden, ffn)):
            matrix(f"blk.{i}.ffn_{name}", rows, columns)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    write(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
