"""torchao: integer weights, rounded to nearest."""

from __future__ import annotations

import torch
from common import GROUP, Run, linears
from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_

run = Run.begin()
model = run.load()
names = {name for name, _ in linears(model)}
eight = run.options.bits == 8
granularity = PerAxis(0) if eight else PerGroup(GROUP)
kind = {8: torch.int8, 4: torch.int4}[run.options.bits]
quantize_(model, IntxWeightOnlyConfig(weight_dtype=kind, granularity=granularity), filter_fn=lambda _, n: n in names)
weights = {name: model.get_submodule(name).weight.dequantize().float() for name in names}
run.nominal(8 + 16 / 576 if eight else 4 + 16 / GROUP, model)
run.finish(weights)
