"""llama.cpp with an importance matrix: the mean squares of the inputs of each layer over the calibration text.

A file of type IQ3_XXS or IQ2_XS is no such thing in whole: llama.cpp itself takes wider types for the layers it holds
dear, and IQ4_NL (4.5 bits) where rows are no multiple of 256 weights. The bits of what it chose are counted.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from pathlib import Path
from typing import Any

import llama_cpp
import torch
from common import Run, linears
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize
from torch import nn

TYPES = {
    8: llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    4: llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_NL,
    3: llama_cpp.LLAMA_FTYPE_MOSTLY_IQ3_XXS,
    2: llama_cpp.LLAMA_FTYPE_MOSTLY_IQ2_XS,
}
F32 = 0
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(layer: str) -> str:
    """blk.3.attn_q.weight of model.layers.3.self_attn.q_proj."""
    index, part = layer.split(".layers.")[1].split(".", 1)
    return f"blk.{index}.{PARTS[part]}.weight"


def write(model: Any, path: Path) -> None:
    """The model in float32. Query and key rows stay in their order: rows are quantized one by one, nothing is run."""
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.detach().numpy())
    for name, module in model.named_modules():
        if ".layers." in name and name.split(".layers.")[1].partition(".")[2] in PARTS:
            writer.add_tensor(gguf_name(name), module.weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def importance(model: nn.Module, windows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Mean squares of the inputs (k,) of each layer."""
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def add(_layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            sums[name] = sums.get(name, torch.zeros(())) + inputs[0].flatten(0, -2).square().sum(0)

        return add

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in linears(model)]
    with torch.no_grad():
        for ids in windows:
            model.model(ids, use_cache=False)
    for handle in hooks:
        handle.remove()
    tokens = sum(ids.numel() for ids in windows)
    return {name: (s / tokens).contiguous() for name, s in sums.items()}


def matrix(squares: dict[str, torch.Tensor]) -> Any:
    """As llama.cpp takes it, an entry without a name at the end."""
    entries = (llama_cpp.llama_model_imatrix_data * (len(squares) + 1))()
    for i, (name, values) in enumerate(squares.items()):
        entries[i].name = gguf_name(name).encode()
        entries[i].data = ctypes.cast(values.data_ptr(), ctypes.POINTER(ctypes.c_float))
        entries[i].size = values.numel()
    return entries


run = Run.begin()
model = run.load()
names = {gguf_name(name): name for name, _ in linears(model)}
original, packed = (Path(f"{run.options.out}-{what}.gguf") for what in ("float", "packed"))
try:
    write(model, original)
    run.start()
    entries = matrix(squares := importance(model, run.tokens()))
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = torch.get_num_threads()
    params.ftype = TYPES[run.options.bits]
    params.token_embedding_type = params.output_tensor_type = F32  # is not judged
    params.imatrix = entries
    if llama_cpp.llama_model_quantize(str(original).encode(), str(packed).encode(), params):
        raise SystemExit("llama_model_quantize failed")
    run.stop()
    weights, kinds = {}, Counter()
    for tensor in GGUFReader(packed).tensors:
        if tensor.name in names:
            w = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            weights[names[tensor.name]] = w
            kinds[tensor.tensor_type.name] += w.numel()
            run.bits.append((8.0 * int(tensor.n_bytes), w.numel()))
    run.note = ", ".join(f"{kind} {n / kinds.total():.0%}" for kind, n in kinds.most_common())
finally:
    for path in (original, packed):
        path.unlink(missing_ok=True)
run.finish(weights)
