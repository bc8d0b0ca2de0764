"""GPTQModel: GPTQ and AWQ on the CPU."""

from __future__ import annotations

import time

from common import GROUP, Run, linears
from gptqmodel import GPTQModel, QuantizeConfig

run = Run.begin()
names = [name for name, _ in linears(run.load())]
config = QuantizeConfig(
    bits=run.options.bits,
    group_size=GROUP,
    device="cpu",
    **({"quant_method": "awq", "format": "gemm"} if run.options.method == "awq" else {"act_group_aware": True}),
)
model = GPTQModel.load(run.options.model, config)
data = [{"input_ids": ids[0].tolist(), "attention_mask": [1] * ids.shape[1]} for ids in run.tokens()]
run.started = time.perf_counter()
model.quantize(data, batch_size=1)
weights = {}
for name in names:
    layer = model.model.get_submodule(name)
    weights[name] = layer.dequantize_weight().T.float()
    run.stored([layer.qweight, layer.qzeros, layer.scales], weights[name].numel())
run.finish(weights)
