"""llm-compressor: GPTQ, AWQ, SmoothQuant (weights only: its rounded activations are not played back)."""

from __future__ import annotations

from common import GROUP, Run, linears
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.quantization import GPTQModifier
from llmcompressor.modifiers.smoothquant import SmoothQuantModifier

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
scheme = {"group_0": {"targets": ["Linear"], "weights": weights_config}}
common = {"config_groups": scheme, "ignore": ["lm_head"]}
recipe = {
    "gptq": [GPTQModifier(**common)],
    "awq": [AWQModifier(**common)],
    "smoothquant": [SmoothQuantModifier(smoothing_strength=0.5), GPTQModifier(**common)],
}[method]
data = Dataset.from_list([{"input_ids": ids[0].tolist()} for ids in run.tokens()])
oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=run.options.seqlen, num_calibration_samples=len(data))
run.nominal(bits + (16 / 576 if bits == 8 else (16 + bits) / GROUP), model)
run.finish({name: layer.weight.detach().float() for name, layer in linears(model)})
