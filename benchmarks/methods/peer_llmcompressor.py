"""llm-compressor: GPTQ, AWQ, SmoothQuant (its rounded activations are played back by the judge)."""

from __future__ import annotations

import torch
from common import GROUP, Run, linears, others
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

if not torch.cuda.is_available():  # AWQ pins memory for a GPU whether there is one or not, and would end there
    torch.Tensor.pin_memory = lambda self, *_args: self  # type: ignore[method-assign, assignment]

run = Run.begin()
model = run.load()
bits, method = run.options.bits, run.options.method
weights_config = {
    "num_bits": bits,
    "type": "int",
    "symmetric": bits == 8,
    "strategy": "channel" if bits == 8 else "group",
    **({} if bits == 8 else {"group_size": GROUP}),
}
common = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights_config}}, "ignore": ["lm_head"]}
recipe = {
    "gptq": lambda: [GPTQModifier(**common)],
    "awq": lambda: [AWQModifier(), QuantizationModifier(**common)],
    "smoothquant": lambda: [SmoothQuantModifier(smoothing_strength=0.5), QuantizationModifier(**common)],
}[method]()
data = Dataset.from_list([{"input_ids": ids[0].tolist()} for ids in run.tokens()])
run.start()
oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=run.options.seqlen, num_calibration_samples=len(data))
run.nominal(bits + (16 / 576 if bits == 8 else (16 + bits) / GROUP), model)
weights = dict(others(model))  # norms have taken factors
with torch.no_grad():
    for name, layer in linears(model):  # scales are applied as the layer runs
        weights[name] = layer(torch.eye(layer.in_features)).T.contiguous()
run.finish(weights)
