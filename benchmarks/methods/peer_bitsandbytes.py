"""bitsandbytes: NF4 with double quantization; the int8 weights of LLM.int8(), without its float columns."""

from __future__ import annotations

import bitsandbytes.functional as F
from common import GROUP, Run, linears

run = Run.begin()
model = run.load()
weights = {}
for name, layer in linears(model):
    w = layer.weight.data
    if run.options.method == "nf4":
        codes, state = F.quantize_4bit(w, blocksize=GROUP, compress_statistics=True, quant_type="nf4")
        weights[name] = F.dequantize_4bit(codes, state)
        run.stored([codes, state.absmax, state.state2.absmax], w.numel())
    else:
        codes, scale, _ = F.int8_vectorwise_quant(w.half())
        weights[name] = codes.float() * (scale[:, None] / 127)
        run.stored([codes, scale], w.numel())
run.finish(weights)
