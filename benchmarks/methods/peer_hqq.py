"""HQQ by its authors' package, on the CPU."""

from __future__ import annotations

import torch
from common import GROUP, Run, linears
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

run = Run.begin()
model = run.load()
config = BaseQuantizeConfig(nbits=run.options.bits, group_size=GROUP, axis=1)
weights = {}
for name, layer in linears(model):
    numel = layer.weight.numel()
    packed = HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
    weights[name] = packed.dequantize()
    run.stored([packed.W_q, packed.meta["scale"].half(), packed.meta["zero"].half()], numel)
run.finish(weights)
