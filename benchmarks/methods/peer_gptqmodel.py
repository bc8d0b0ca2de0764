"""GPTQModel: GPTQ (group-aware activation order, its default) and AWQ on the CPU, with zero points as ours."""

from __future__ import annotations

import os
import shutil

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with fewer it does not start on a machine with two cores

import torch
from common import GROUP, Run, linears, others
from gptqmodel import GPTQModel, QuantizeConfig

run = Run.begin()
names = [name for name, _ in linears(run.load())]
bits, awq = run.options.bits, run.options.method == "awq"
config = QuantizeConfig(
    bits=bits,
    group_size=-1 if bits == 8 else GROUP,
    sym=bits == 8,
    device="cpu",
    offload_to_disk=False,
    **({"quant_method": "awq", "format": "gemm"} if awq else {}),
    **({"act_group_aware": False, "desc_act": True} if bits == 8 else {}),  # its default order wants groups
)
model = GPTQModel.load(run.options.model, config)
data = [{"input_ids": ids[0].tolist(), "attention_mask": [1] * ids.shape[1]} for ids in run.tokens()]
run.start()
model.quantize(data, batch_size=1)
run.stop()
packed = run.options.out + "-packed"
model.save(packed)  # in memory its layers are not yet what they will be: zero points are stored another way
model = GPTQModel.load(packed, device="cpu")
shutil.rmtree(packed)
weights = dict(others(model.model))  # norms have taken factors of AWQ
for name in names:
    layer = model.model.get_submodule(name)
    run.stored([layer.qweight, layer.qzeros, layer.scales], layer.in_features * layer.out_features)
    with torch.no_grad():  # its packed layout depends on the CPU: what the layer does is what it means
        weights[name] = layer(torch.eye(layer.in_features)[None])[0].T.float().contiguous()
run.finish(weights)
